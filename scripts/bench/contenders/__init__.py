"""One module a library; each function loads a model and returns what runs requests on it."""
