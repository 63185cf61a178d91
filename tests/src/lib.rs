//! uniarm-tests
