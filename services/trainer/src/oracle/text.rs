//! Oracles that count: characters, syllables, swear words.

use rustrict::{Censor, Type};

use super::{Answer, Oracle, OracleError};

const VOWELS: &str = "aeiouyàáâãäåæèéêëìíîïòóôõöøœùúûü";

/// −ln(max(1, characters)): half as long is ln 2 better, whatever the length. White space at the ends does not count.
/// Characters and not words, because a model that is rewarded for few words learns to write rows of punctuation.
pub struct Brevity;

/// Flesch reading ease: 206.835 − 1.015 · words / sentences − 84.6 · syllables / words [Flesch 1948]. Everyday prose
/// lies between 60 and 70. A text without a word scores [`Readability::EMPTY`].
pub struct Readability;

/// −1 for each detected swear word or slur per hundred characters; 0 is clean. Detection is the crate `rustrict`'s,
/// which sees through spellings such as `sh1t`.
pub struct Profanity;

// === impl Brevity ===

impl Oracle for Brevity {
    fn name(&self) -> &str {
        "brevity"
    }

    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError> {
        let characters = |answer: &Answer<'_>| answer.response.trim().chars().count();
        Ok(answers.iter().map(|answer| -(characters(answer).max(1) as f64).ln()).collect())
    }
}

// === impl Readability ===

impl Readability {
    /// What the formula gives for one word of no syllable: the empty answer is easy to read, and no better than
    /// the easiest one.
    pub const EMPTY: f64 = 206.835 - 1.015;
}

impl Oracle for Readability {
    fn name(&self) -> &str {
        "readability"
    }

    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError> {
        Ok(answers.iter().map(|answer| reading_ease(answer.response)).collect())
    }
}

fn reading_ease(text: &str) -> f64 {
    let words: Vec<&str> =
        text.split_whitespace().filter(|word| word.contains(char::is_alphanumeric)).collect();
    if words.is_empty() {
        return Readability::EMPTY;
    }
    let count = words.len() as f64;
    let syllables: usize = words.iter().map(|word| syllables(word)).sum();
    206.835 - 1.015 * count / sentences(text) as f64 - 84.6 * syllables as f64 / count
}

/// Runs of words that a full stop, an exclamation mark or a question mark ends, or a line break does (lists and
/// headings have no full stops). A full stop inside a word ends none: 3.5, U.S.
fn sentences(text: &str) -> usize {
    let mut sentences = 0;
    for line in text.lines() {
        let mut open = false;
        for word in line.split_whitespace() {
            open |= word.contains(char::is_alphanumeric);
            let ends =
                word.trim_end_matches(['"', '\'', ')', ']', '”', '’', '*']).ends_with(['.', '!', '?', '…']);
            if open && ends {
                sentences += 1;
                open = false;
            }
        }
        sentences += usize::from(open);
    }
    sentences.max(1)
}

/// Groups of the vowels a, e, i, o, u, y; a final e is mute (`make`) unless it follows a consonant and l (`table`);
/// so is the e of a final `es` and `ed` (`makes`, `liked`) unless it follows a sound that needs it (`boxes`,
/// `wanted`). At least one. A vowel with an accent is never
/// mute (`café`).
fn syllables(word: &str) -> usize {
    let letters: Vec<char> = word.to_lowercase().chars().filter(|c| c.is_alphabetic()).collect();
    let vowel = |index: usize| VOWELS.contains(letters[index]);
    let groups =
        (0..letters.len()).filter(|&index| vowel(index) && (index == 0 || !vowel(index - 1))).count();
    groups.saturating_sub(usize::from(ends_mute(&letters))).max(1)
}

fn ends_mute(letters: &[char]) -> bool {
    let consonant = |c: char| !VOWELS.contains(c);
    match *letters {
        [.., c, 'l', 'e'] if consonant(c) => false,
        [.., c, 'e'] => consonant(c),
        [.., c, 'e', 's'] => {
            consonant(c) && !"sxzcg".contains(c) && !ends_hushed(letters) && !ends_table(letters)
        }
        [.., c, 'e', 'd'] => consonant(c) && !"td".contains(c),
        _ => false,
    }
}

/// `wishes`, `churches`
fn ends_hushed(letters: &[char]) -> bool {
    matches!(*letters, [.., 's' | 'c', 'h', 'e', 's'])
}

/// `tables`
fn ends_table(letters: &[char]) -> bool {
    matches!(*letters, [.., c, 'l', 'e', 's'] if !VOWELS.contains(c))
}

// === impl Profanity ===

impl Oracle for Profanity {
    fn name(&self) -> &str {
        "profanity"
    }

    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError> {
        Ok(answers.iter().map(|answer| cleanness(answer.response)).collect())
    }
}

/// Word by word, so that two harmless neighbours make no swear word, and an answer's score is a rate: a long answer
/// is not worse for its length.
fn cleanness(text: &str) -> f64 {
    let foul = |word: &str| Censor::from_str(word).analyze().is(Type::INAPPROPRIATE);
    let found = text.split_whitespace().filter(|word| foul(word)).count();
    // Subtracted from zero: a clean text scores 0, not −0.
    0.0 - 100.0 * found as f64 / (text.chars().count().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halving_a_text_gains_ln_2() {
        let score = |response| {
            let answer = Answer { messages: &[], response };
            Brevity.score(&[answer]).unwrap()[0]
        };
        assert_eq!(score(""), 0.0);
        assert_eq!(score("é"), 0.0);
        assert!((score(" one two ") - score("one two\n3 more") - 2_f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn syllables_follow_the_rule() {
        let known = [
            ("a", 1),
            ("the", 1),
            ("make", 1),
            ("makes", 1),
            ("table", 2),
            ("tables", 2),
            ("boxes", 2),
            ("liked", 1),
            ("wanted", 2),
            ("wishes", 2),
            ("beautiful", 3),
            ("café", 2),
            ("don't", 1),
            ("rhythm", 1),
            ("2024", 1),
            ("syllable", 3),
            ("readability", 5),
            ("see", 1),
            ("changes", 2),
        ];
        for (word, count) in known {
            assert_eq!(syllables(word), count, "{word}");
        }
    }

    /// Counted by hand: 6 words, 1 sentence, 6 syllables; 14 words, 2 sentences, 24 syllables.
    #[test]
    fn reading_ease_is_flesch_s_formula() {
        assert!((reading_ease("The cat sat on the mat.") - 116.145).abs() < 1e-9);
        let harder = "Economical administration of municipal property requires dedication. Officials \
                      frequently disregard it anyway, he says.";
        assert!(reading_ease(harder) < 0.0);
        assert!((reading_ease("Hi there") - (206.835 - 2.03 - 84.6)).abs() < 1e-9);
        assert_eq!(reading_ease(" … "), Readability::EMPTY);
    }

    #[test]
    fn lists_decimals_and_quotes_end_sentences_where_people_would() {
        assert_eq!(sentences("It is 3.5 degrees. \"Cold!\" he said (twice)."), 3);
        assert_eq!(sentences("Shopping\n- milk\n- eggs"), 3);
        assert_eq!(sentences("Wait... what?!"), 2);
        assert_eq!(sentences(""), 1);
    }

    #[test]
    fn swearing_is_found_in_disguise_and_not_in_innocent_words() {
        assert_eq!(cleanness("The assassin passed the classic cocktail in Scunthorpe.").to_bits(), 0);
        assert_eq!(cleanness("").to_bits(), 0);
        assert!(cleanness("This is sh1t.") < 0.0);
        assert!(
            cleanness("This is shit.") < cleanness("This is shit, but the rest of it is perfectly nice.")
        );
    }
}
