"""Raw images -> prepared arrays, split into train, val and test."""
