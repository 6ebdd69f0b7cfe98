"""One file is one package that competes; every module here is found, none is listed."""
