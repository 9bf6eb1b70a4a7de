-- Sub-folders are for people: the version alone gives the order.
ALTER TABLE orders ADD COLUMN total INTEGER;
