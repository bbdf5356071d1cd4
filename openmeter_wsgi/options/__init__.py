"""The options of a policy: what there is, how each is read, where it comes from."""
