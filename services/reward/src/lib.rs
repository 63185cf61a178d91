//! uniarm-reward
