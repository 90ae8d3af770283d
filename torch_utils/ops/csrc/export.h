// Names of exported kernels: one C symbol per instruction set that a file is compiled for.
#pragma once

#ifndef SPHEREHEAD_ISA
#define SPHEREHEAD_ISA baseline
#endif

#define SPHEREHEAD_JOIN_(a, b) a##__##b
#define SPHEREHEAD_JOIN(a, b) SPHEREHEAD_JOIN_(a, b)

// SPHEREHEAD_EXPORT(int, f)(args) {...} defines `extern "C" int f__<isa>(args)`; torch_utils/native.py chooses among them.
#define SPHEREHEAD_EXPORT(type, name) \
    extern "C" __attribute__((visibility("default"))) type SPHEREHEAD_JOIN(name, SPHEREHEAD_ISA)
