//! Member stores: what all of them promise, and what the one in etcd survives.

#![allow(clippy::unwrap_used)]

mod catalogue;
mod conformance;
mod faults;
mod fixtures;
mod link;
mod tls;
mod work;
