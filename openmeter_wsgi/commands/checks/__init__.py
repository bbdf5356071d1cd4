"""What ``openmeter-wsgi check`` looks at: one module per kind of finding."""
