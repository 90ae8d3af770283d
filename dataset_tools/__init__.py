"""Make and check data sets of heads, as a library: no command line, no printing but one progress bar."""
