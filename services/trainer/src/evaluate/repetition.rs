//! Signs of answers that say nothing, whatever an oracle thinks of them.

use std::collections::HashSet;

/// Words of the piece whose repetition marks a loop.
const REPEATED_WORDS: usize = 4;

/// Different pairs of neighbouring words over all such pairs of all answers (distinct-2).
pub fn distinct_2<'a>(answers: impl Iterator<Item = &'a str>) -> f64 {
    let mut different = HashSet::new();
    let mut all = 0_usize;
    for answer in answers {
        let words: Vec<&str> = answer.split_whitespace().collect();
        all += words.windows(2).count();
        different.extend(words.windows(2).map(<[&str]>::to_vec));
    }
    if all == 0 { 1.0 } else { different.len() as f64 / all as f64 }
}

/// Share of an answer's pieces of four words that it has said before.
pub fn repetition(answer: &str) -> f64 {
    let words: Vec<&str> = answer.split_whitespace().collect();
    let all = words.windows(REPEATED_WORDS).count();
    let different: HashSet<&[&str]> = words.windows(REPEATED_WORDS).collect();
    if all == 0 { 0.0 } else { 1.0 - different.len() as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_show_in_repetition_and_in_distinct_2() {
        assert!((repetition("a b c d a b c d a b c d") - 5.0 / 9.0).abs() < 1e-12);
        assert_eq!(repetition("one two three four five six"), 0.0);
        assert_eq!(distinct_2(["a b c", "a b d"].into_iter()), 0.75);
    }
}
