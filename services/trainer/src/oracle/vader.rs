//! VADER's compound sentiment (Hutto and Gilbert, ICWSM 2014), rule for rule as the reference implementation
//! `vaderSentiment` 3.3.2 computes it.
//!
//! The lexicons are those of the crate `vader_sentiment`; its rules are not used. They miss negation by `no`, idioms and
//! `least`, take words of two letters apart, and walk a hash map in an order that changes from run to run,
//! so that one text can have two scores. Oddities of the reference (see [`weigh_but`]) are kept: its numbers are the
//! published ones.

use std::collections::HashMap;

use vader_sentiment::{EMOJI_LEXICON, LEXICON};

use super::{Answer, Oracle, OracleError};

const BOOST: f64 = 0.293;
const CAPITALS: f64 = 0.733;
const NEGATION: f64 = -0.74;
/// Approximates the largest sum that is to be expected; the score is sum / √(sum² + 15).
const NORMALISATION: f64 = 15.0;
const EXCLAMATION: f64 = 0.292;
const EXCLAMATIONS_MAX: usize = 4;
const QUESTION: f64 = 0.18;
const QUESTIONS_MAX: f64 = 0.96;

/// Where the lexicon of the crate differs from that of `vaderSentiment` 3.3.2, for words in lower case: none where the
/// reference knows no such word.
const CORRECTIONS: [(&str, Option<f64>); 5] =
    [(":-þ", None), (":þ", None), (":p", Some(1.0)), ("heart", Some(3.2)), ("hearts", Some(3.3))];

const NEGATIONS: &str = "aint arent cannot cant couldnt darent didnt doesnt ain't aren't can't couldn't daren't \
    didn't doesn't dont hadnt hasnt havent isnt mightnt mustnt neither don't hadn't hasn't haven't isn't mightn't \
    mustn't neednt needn't never none nope nor not nothing nowhere oughtnt shant shouldnt uhuh wasnt werent oughtn't \
    shan't shouldn't uh-uh wasn't weren't without wont wouldnt won't wouldn't rarely seldom despite";

const BOOSTERS: &str = "absolutely amazingly awfully completely considerable considerably decidedly deeply effing \
    enormous enormously entirely especially exceptional exceptionally extreme extremely fabulously flipping flippin \
    frackin fracking fricking frickin frigging friggin fully fuckin fucking fuggin fugging greatly hella highly hugely \
    incredible incredibly intensely major majorly more most particularly purely quite really remarkably so \
    substantially thoroughly total totally tremendous tremendously uber unbelievably unusually utter utterly very";

/// Separated by commas: some are two words.
const DAMPENERS: &str = "almost,barely,hardly,just enough,kind of,kinda,kindof,kind-of,less,little,marginal,\
    marginally,occasional,occasionally,partly,scarce,scarcely,slight,slightly,somewhat,sort of,sorta,sortof,sort-of";

const IDIOMS: [(&str, f64); 9] = [
    ("the shit", 3.0),
    ("the bomb", 3.0),
    ("bad ass", 1.5),
    ("badass", 1.5),
    ("bus stop", 0.0),
    ("yeah right", -2.0),
    ("kiss of death", -1.5),
    ("to die for", 3.0),
    ("beating heart", 3.5),
];

/// Compound sentiment, from −1 to 1.
pub struct Vader {
    /// By word in lower case.
    lexicon: HashMap<String, f64>,
    /// What a booster adds, and a dampener takes.
    degrees: HashMap<&'static str, f64>,
}

/// A text taken apart.
struct Words {
    written: Vec<String>,
    lower: Vec<String>,
    /// Some words are in capitals, and others are not: capitals mean something.
    capitals_differ: bool,
}

// === impl Vader ===

impl Vader {
    pub fn new() -> Self {
        let lexicon = LEXICON.iter().map(|(word, valence)| (word.to_lowercase(), *valence));
        let mut lexicon: HashMap<String, f64> = lexicon.collect();
        for (word, valence) in CORRECTIONS {
            match valence {
                Some(valence) => lexicon.insert(word.to_owned(), valence),
                None => lexicon.remove(word),
            };
        }
        let boosters = BOOSTERS.split_whitespace().map(|word| (word, BOOST));
        let dampeners = DAMPENERS.split(',').map(|word| (word, -BOOST));
        Self { lexicon, degrees: boosters.chain(dampeners).collect() }
    }

    /// The compound score.
    pub fn compound(&self, text: &str) -> f64 {
        let text = describe_emoji(text);
        let words = Words::of(&text);
        let valence = |index: usize| {
            let word = words.lower[index].as_str();
            let next = words.lower.get(index + 1).map(String::as_str);
            let neutral = self.degrees.contains_key(word) || (word == "kind" && next == Some("of"));
            if neutral { 0.0 } else { self.valence(&words, index) }
        };
        let mut valences: Vec<f64> = (0..words.lower.len()).map(valence).collect();
        weigh_but(&words.lower, &mut valences);
        let sum: f64 = valences.iter().sum();
        let sum = if sum == 0.0 { 0.0 } else { sum + sum.signum() * emphasis(&text) };
        (sum / (sum * sum + NORMALISATION).sqrt()).clamp(-1.0, 1.0)
    }

    fn known(&self, word: &str) -> bool {
        self.lexicon.contains_key(word)
    }

    /// Of one word, under the influence of the three before it.
    fn valence(&self, words: &Words, index: usize) -> f64 {
        let Some(&own) = self.lexicon.get(&words.lower[index]) else { return 0.0 };
        let mut valence = self.under_no(words, index, own);
        if words.shouted(index) {
            valence += if valence > 0.0 { CAPITALS } else { -CAPITALS };
        }
        for distance in 1..=3.min(index) {
            let before = index - distance;
            if self.known(&words.lower[before]) {
                continue;
            }
            valence += self.degree(words, before, valence) * [1.0, 0.95, 0.9][distance - 1];
            valence *= negation(&words.lower, index, distance);
            if distance == 3 {
                valence = self.idioms(&words.lower, index, valence);
            }
        }
        self.least(&words.lower, index, valence)
    }

    /// `no` is a word of its own, or negates the known word that follows.
    fn under_no(&self, words: &Words, index: usize, own: f64) -> f64 {
        let lower = &words.lower;
        let is = |distance: usize, word: &str| index >= distance && lower[index - distance] == word;
        if is(1, "no") || is(2, "no") || (is(3, "no") && (is(1, "or") || is(1, "nor"))) {
            return own * NEGATION;
        }
        let negates = lower[index] == "no" && lower.get(index + 1).is_some_and(|next| self.known(next));
        if negates { 0.0 } else { own }
    }

    /// What a booster or dampener adds to a valence.
    fn degree(&self, words: &Words, index: usize, valence: f64) -> f64 {
        let Some(&degree) = self.degrees.get(words.lower[index].as_str()) else { return 0.0 };
        let degree = if valence < 0.0 { -degree } else { degree };
        match words.shouted(index) {
            true if valence > 0.0 => degree + CAPITALS,
            true => degree - CAPITALS,
            false => degree,
        }
    }

    fn idioms(&self, lower: &[String], index: usize, mut valence: f64) -> f64 {
        let phrase = |from: usize, to: usize| lower[from..=to].join(" ");
        let idiom =
            |phrase: &String| IDIOMS.iter().find(|(idiom, _)| idiom == phrase).map(|(_, valence)| *valence);
        let (three, two, one) = (index - 3, index - 2, index - 1);
        let ending = [
            phrase(one, index),
            phrase(two, index),
            phrase(two, one),
            phrase(three, one),
            phrase(three, two),
        ];
        valence = ending.iter().find_map(idiom).unwrap_or(valence);
        for end in [index + 1, index + 2].into_iter().filter(|end| *end < lower.len()) {
            valence = idiom(&phrase(index, end)).unwrap_or(valence);
        }
        let before = [phrase(three, one), phrase(three, two), phrase(two, one)];
        valence + before.iter().filter_map(|phrase| self.degrees.get(phrase.as_str())).sum::<f64>()
    }

    /// `least` negates, unless it is `at least` or `very least`.
    fn least(&self, lower: &[String], index: usize, valence: f64) -> f64 {
        let is_least = index > 0 && lower[index - 1] == "least" && !self.known("least");
        let softened = index > 1 && ["at", "very"].contains(&lower[index - 2].as_str());
        if is_least && !softened { valence * NEGATION } else { valence }
    }
}

impl Default for Vader {
    fn default() -> Self {
        Self::new()
    }
}

impl Oracle for Vader {
    fn name(&self) -> &str {
        "vader"
    }

    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError> {
        Ok(answers.iter().map(|answer| self.compound(answer.response)).collect())
    }
}

/// Emoji become the words that describe them.
fn describe_emoji(text: &str) -> String {
    let mut described = String::with_capacity(text.len());
    let mut after_space = true;
    for character in text.chars() {
        let mut buffer = [0; 4];
        match EMOJI_LEXICON.get(&*character.encode_utf8(&mut buffer)) {
            Some(description) => {
                if !after_space {
                    described.push(' ');
                }
                described.push_str(description);
                after_space = false;
            }
            None => {
                described.push(character);
                after_space = character == ' ';
            }
        }
    }
    described
}

/// What negation within `distance` words before makes of a valence.
fn negation(lower: &[String], index: usize, distance: usize) -> f64 {
    let is = |distance: usize, word: &str| lower[index - distance] == word;
    let intensifies = |distance: usize| is(distance, "so") || is(distance, "this");
    let (never, without_doubt) = match distance {
        1 => (false, false),
        2 => (is(2, "never") && intensifies(1), is(2, "without") && is(1, "doubt")),
        _ => (
            (is(3, "never") && intensifies(2)) || intensifies(1),
            is(3, "without") && (is(2, "doubt") || is(1, "doubt")),
        ),
    };
    let word = &lower[index - distance];
    let negated = || NEGATIONS.split_whitespace().any(|negation| negation == word) || word.contains("n't");
    match (never, without_doubt) {
        (true, _) => 1.25,
        (false, true) => 1.0,
        (false, false) => {
            if negated() {
                NEGATION
            } else {
                1.0
            }
        }
    }
}

/// Words before `but` count half, words after it one and a half.
///
/// The reference looks each value up by *equality* in the list that it is changing: of equal values the first is
/// changed again and again, and the later ones stay. Published scores contain that, so it is repeated here.
fn weigh_but(lower: &[String], valences: &mut [f64]) {
    let Some(but) = lower.iter().position(|word| word == "but") else { return };
    for index in 0..valences.len() {
        let first = valences.iter().position(|value| *value == valences[index]).unwrap_or(index);
        match first.cmp(&but) {
            std::cmp::Ordering::Less => valences[first] *= 0.5,
            std::cmp::Ordering::Equal => {}
            std::cmp::Ordering::Greater => valences[first] *= 1.5,
        }
    }
}

/// Of exclamation and question marks.
fn emphasis(text: &str) -> f64 {
    let exclamations = text.matches('!').count().min(EXCLAMATIONS_MAX) as f64;
    let questions = match text.matches('?').count() {
        0 | 1 => 0.0,
        count @ 2..=3 => count as f64 * QUESTION,
        _ => QUESTIONS_MAX,
    };
    exclamations * EXCLAMATION + questions
}

// === impl Words ===

impl Words {
    fn of(text: &str) -> Self {
        let written: Vec<String> = text.split_whitespace().map(strip).map(str::to_owned).collect();
        let lower = written.iter().map(|word| word.to_lowercase()).collect();
        let capitals = written.iter().filter(|word| in_capitals(word)).count();
        let capitals_differ = 0 < capitals && capitals < written.len();
        Self { written, lower, capitals_differ }
    }

    fn shouted(&self, index: usize) -> bool {
        self.capitals_differ && in_capitals(&self.written[index])
    }
}

/// Without the punctuation around it; what is then two characters or fewer was an emoticon, and stays.
fn strip(word: &str) -> &str {
    let stripped = word.trim_matches(|c: char| c.is_ascii_punctuation());
    if stripped.chars().count() <= 2 { word } else { stripped }
}

/// No letter is small, and there is one.
fn in_capitals(word: &str) -> bool {
    !word.contains(char::is_lowercase) && word.contains(char::is_uppercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines `compound TAB text` of `vaderSentiment` 3.3.2: its own examples, and whatever its rules tell apart.
    const RECORDED: &str = include_str!("../../tests/golden/vader.tsv");

    #[test]
    fn scores_are_those_of_the_reference_implementation() {
        let vader = Vader::new();
        for line in RECORDED.lines() {
            let (compound, text) = line.split_once('\t').unwrap();
            let (compound, text) = (compound.parse::<f64>().unwrap(), text.replace("\\n", "\n"));
            let found = vader.compound(&text);
            assert!((found - compound).abs() < 1e-12, "{found}, not {compound}: {text}");
        }
        assert!(RECORDED.lines().count() >= 50);
    }
}
