"""A campaign of files, command lines and kernels that nobody would write; see __main__.py."""
