//! Digests by which jobs know their inputs, and seeds that are functions of their reasons.

use sha2::{Digest as _, Sha256};
pub use uniarm_proto::digits::hexadecimal;

/// Bytes of a checksum: it finds torn and rotten lines, it is no defence against a forger.
const CHECK_BYTES: usize = 4;

/// Of a line of a journal.
pub fn checksum(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes)[..CHECK_BYTES])
}

/// A seed that is a function of its reasons alone: another order of prompts changes no answer.
pub fn seed(run: u64, reasons: &[&str]) -> u64 {
    let mut digest = Sha256::new();
    digest.update(run.to_le_bytes());
    for reason in reasons {
        digest.update((reason.len() as u64).to_le_bytes());
        digest.update(reason);
    }
    let bytes: [u8; 8] = digest.finalize()[..8].try_into().expect("a digest of 32 bytes");
    u64::from_le_bytes(bytes)
}
