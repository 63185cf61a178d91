//! Bytes that nobody would send, for every parser: good inputs are altered again and again, and none may end in a panic.
//!
//! A target says in words what it found wrong. An input whose words are new is altered further: where refusals differ, a
//! parser went another way, and that costs no instrumentation. Each target is a test beside its parser, which runs for
//! [`SECONDS`] or for as long as `UNIARM_FUZZ_SECONDS` says (`make fuzz`), from `UNIARM_FUZZ_SEED` on. It is the thread's own
//! time that counts: on a busy machine as many inputs are tried.

mod mutate;

use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rustix::time::{ClockId, clock_gettime};

pub use mutate::JSON;

/// In CI: enough that what breaks at once does so there.
const SECONDS: f64 = 1.0;

/// Inputs that are altered further.
const CORPUS_MAX: usize = 2000;

/// Alterations of one input.
const ALTERATIONS_MAX: usize = 6;

/// Altered `seeds`, for the time that is given. `words` are put in where they may fit; `parse` gives what it found wrong,
/// or nothing.
///
/// # Panics
/// When `parse` does: the input is kept in a file, which the message names.
pub fn fuzz(name: &str, seeds: &[Vec<u8>], words: &[&str], mut parse: impl FnMut(&[u8]) -> String) {
    let variable = |variable: &str| std::env::var(variable).ok();
    let seconds = variable("UNIARM_FUZZ_SECONDS").and_then(|text| text.parse().ok()).unwrap_or(SECONDS);
    let seed = variable("UNIARM_FUZZ_SEED").and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    let (end, mut dice) = (own_time() + Duration::from_secs_f64(seconds), StdRng::seed_from_u64(seed));
    let (mut corpus, mut seen, mut tried) = (seeds.to_vec(), BTreeSet::new(), 0_u64);
    while own_time() < end {
        let mut input = corpus[dice.random_range(0..corpus.len())].clone();
        let other = dice.random_range(0..corpus.len());
        for _ in 0..dice.random_range(1..=ALTERATIONS_MAX) {
            mutate::alter(&mut input, &corpus[other], words, &mut dice);
        }
        tried += 1;
        match catch_unwind(AssertUnwindSafe(|| parse(&input))) {
            Ok(found) => {
                if seen.insert(shape(&found)) && corpus.len() < CORPUS_MAX {
                    corpus.push(input);
                }
            }
            Err(_) => {
                panic!("{name}: a panic by seed {seed}, of the input in {}", keep(name, &input).display())
            }
        }
    }
    println!("{name}: {tried} inputs in {seconds} s, {} kinds of answers, seed {seed}", seen.len());
}

/// Time that this thread has had of a processor.
fn own_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().expect("this clock counts from 0")
}

/// Where files of a target are quick to write: thousands a second, and none of them worth a disk.
#[must_use]
pub fn scratch() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

/// What a sentence says, whatever it says it of.
fn shape(found: &str) -> String {
    let letter = |letter: char| letter.is_alphabetic() || letter.is_whitespace();
    found.chars().filter(|character| letter(*character)).take(120).collect()
}

fn keep(name: &str, input: &[u8]) -> PathBuf {
    let path = std::env::temp_dir().join(format!("uniarm-fuzz-{name}-{}", std::process::id()));
    if let Err(error) = std::fs::write(&path, input) {
        eprintln!("{name}: the input cannot be kept: {error}: {input:?}");
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_two_steps_away_is_found() {
        // A panic behind two refusals: chance alone would not come there.
        let parse = |bytes: &[u8]| match bytes {
            [b'{', b'"', rest @ ..] => match rest {
                [b'9', ..] => panic!("found"),
                [digit, ..] if digit.is_ascii_digit() => "a digit".to_owned(),
                _ => "a name".to_owned(),
            },
            [b'{', ..] => "an object".to_owned(),
            _ => "nothing".to_owned(),
        };
        let found = catch_unwind(|| {
            for _ in 0..60 {
                fuzz("two steps", &[b"{}".to_vec()], JSON, parse);
            }
        });
        assert!(found.is_err());
    }
}
