//! A DECNET master on 127.0.0.1 with its own CA, for the demo, tests, benches and embedders' tests.
