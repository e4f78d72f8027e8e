"""Methods as the classes that they were before they were written as parts; what parts are compared with."""
