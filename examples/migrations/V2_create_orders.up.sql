CREATE TABLE orders (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers (id),
    quantity INTEGER NOT NULL,
    unit_price INTEGER NOT NULL -- in cents
);

INSERT INTO orders (id, customer_id, quantity, unit_price)
VALUES (1, 1, 2, 1250), (2, 2, 1, 990), (3, 2, 10, 75), (4, 3, 3, 400);
