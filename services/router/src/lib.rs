//! uniarm-router
