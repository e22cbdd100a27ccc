//! Where it is written who we are: the environment and `decnet.ini`. Read on the thread that asks.
