"""`export`: the trained backbone as files for others, without what only training needed."""
