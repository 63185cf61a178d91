//! Alterations of bytes: of single ones, of numbers, of ranges, of words.

use rand::{Rng as _, rngs::StdRng};

/// Numbers at the edges of what fits somewhere.
const EDGES: [u64; 14] = [
    0,
    1,
    7,
    127,
    128,
    255,
    256,
    65_535,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 53,
    i64::MAX as u64,
    u64::MAX,
];

/// The same as people write them, and others that no number holds.
const WRITTEN: [&str; 14] = [
    "0",
    "-1",
    "-0",
    "1e999",
    "-1e-999",
    "0.1",
    "4294967296",
    "18446744073709551616",
    "9007199254740993",
    "1e30",
    "00",
    "NaN",
    "1.",
    "1E+2",
];

/// Words of JSON.
pub const JSON: &[&str] = &[
    "null",
    "true",
    "false",
    "{}",
    "[]",
    "\"\"",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "[[[[[[[[[[[[[[[[",
    "{\"\":",
    "\u{feff}",
    "\u{2028}",
    "\r\n",
];

/// The longest that an input becomes.
const BYTES_MAX: usize = 1 << 16;

/// Alters `bytes` in one place; `other` is another input to take pieces of.
pub(crate) fn alter(bytes: &mut Vec<u8>, other: &[u8], words: &[&str], dice: &mut StdRng) {
    let at = dice.random_range(0..=bytes.len());
    let length = dice.random_range(1..=16_usize).min(bytes.len() - at);
    match dice.random_range(0..12) {
        0 if at < bytes.len() => bytes[at] ^= 1 << dice.random_range(0..8),
        1 if at < bytes.len() => bytes[at] = dice.random(),
        2 => bytes.insert(at, dice.random()),
        3 => _ = bytes.drain(at..at + length),
        4 => bytes.truncate(at),
        5 => {
            let piece = bytes[at..at + length].to_vec();
            splice(bytes, at, &piece.repeat(dice.random_range(1..=64)));
        }
        6 => {
            let from = dice.random_range(0..=other.len());
            let to = dice.random_range(from..=other.len().min(from + 64));
            splice(bytes, at, &other[from..to]);
        }
        7 | 8 => binary_number(bytes, at, dice),
        9 => written_number(bytes, at, dice),
        _ if !words.is_empty() => {
            let word = words[dice.random_range(0..words.len())].as_bytes();
            if dice.random() {
                bytes.drain(at..at + length);
            }
            splice(bytes, at, word);
        }
        _ => bytes.insert(at, b'0'),
    }
    bytes.truncate(BYTES_MAX);
}

fn splice(bytes: &mut Vec<u8>, at: usize, piece: &[u8]) {
    bytes.splice(at..at, piece.iter().copied());
}

/// A number of one, two, four or eight bytes becomes one at an edge, or near the length of all.
fn binary_number(bytes: &mut [u8], at: usize, dice: &mut StdRng) {
    let width = 1 << dice.random_range(0..4);
    let number = match dice.random_range(0..4) {
        0 => bytes.len() as u64,
        1 => (bytes.len() as u64).wrapping_sub(dice.random_range(0..64)),
        _ => EDGES[dice.random_range(0..EDGES.len())].wrapping_add_signed(dice.random_range(-1..=1)),
    };
    for (byte, new) in bytes[at..].iter_mut().take(width).zip(number.to_le_bytes()) {
        *byte = new;
    }
}

/// Digits after `at` become a number that is hard to hold.
fn written_number(bytes: &mut Vec<u8>, at: usize, dice: &mut StdRng) {
    let Some(first) = bytes[at..].iter().position(u8::is_ascii_digit).map(|first| at + first) else { return };
    let end =
        bytes[first..].iter().position(|byte| !byte.is_ascii_digit()).map_or(bytes.len(), |end| first + end);
    let written = WRITTEN[dice.random_range(0..WRITTEN.len())];
    bytes.splice(first..end, written.bytes());
}
