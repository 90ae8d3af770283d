"""Networks, rendering and (later) training of 360-degree head generators."""
