//! API keys: drawn at random, shown once, and kept as hashes.

use std::{fmt, str::FromStr};

use sha2::{Digest as _, Sha256};

/// What a key begins with, so that people and scanners of leaked secrets know one when they see it.
const PREFIX: &str = "uniarm_";

/// Of the hash in a file.
const SCHEME: &str = "sha256:";

/// A key is drawn, and so long that nobody guesses it: no salt and no slow hash are needed, as passwords would.
const KEY_BYTES: usize = 32;

/// Longer ones are refused before they are hashed.
const KEY_CHARACTERS_MAX: usize = 256;

/// SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyHash([u8; 32]);

/// A new key, as its holder will send it.
pub fn draw() -> String {
    let bytes: [u8; KEY_BYTES] = rand::random();
    bytes.iter().fold(PREFIX.to_owned(), |key, byte| key + &format!("{byte:02x}"))
}

// === impl KeyHash ===

impl KeyHash {
    /// `None`: no key is so long.
    #[must_use]
    pub fn of(key: &str) -> Option<Self> {
        (key.len() <= KEY_CHARACTERS_MAX).then(|| Self(Sha256::digest(key.as_bytes()).into()))
    }
}

impl FromStr for KeyHash {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WANTED: &str =
            "wants sha256: and 64 hexadecimal digits; `uniarm keys new` prints a key and its line";
        let digits = text.strip_prefix(SCHEME).filter(|digits| digits.len() == 64).ok_or(WANTED)?;
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| WANTED)?;
            // A sign would be taken for a digit.
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(WANTED);
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| WANTED)?;
        }
        Ok(Self(hash))
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SCHEME)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_that_of_sha256_and_reads_as_it_is_written() {
        let hash = KeyHash::of("abc").unwrap();
        let text = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash.to_string(), text);
        assert_eq!(text.parse::<KeyHash>().unwrap(), hash);
        for wrong in
            ["", "abc", "sha256:", &text[..70], &text.replace("ba", "+a"), &text.replace("ba", "\u{e9}")]
        {
            assert!(wrong.parse::<KeyHash>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn drawn_keys_differ_and_are_long() {
        let (first, second) = (draw(), draw());
        assert_ne!(first, second);
        assert_eq!(first.len(), PREFIX.len() + 2 * KEY_BYTES);
        assert!(KeyHash::of(&first).is_some());
        assert!(KeyHash::of(&"x".repeat(KEY_CHARACTERS_MAX + 1)).is_none());
    }
}
