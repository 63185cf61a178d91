//! uniarm-base
