//! What the rows of a measured batch ask: questions, and how each of them is steered.

use uniarm_proto::{ChatMessage, GuidanceTerm, Input};

use super::{args::Rows, synthetic};
use crate::worker::DEMO_PROMPTED;

/// The same questions that the peers answer.
const QUESTIONS: &str = include_str!("../../../../benches/peers/prompts.txt");

/// Name of the adapter.
pub const ADAPTER: &str = "adapter";

/// Strengths of prompted rows: with the texts they make sixteen different steerings.
const STRENGTHS: [f32; 4] = [1.0, 0.5, 1.5, 0.75];

/// The text that the first row is steered by: the one that the demo's models follow best.
const FIRST_TEXT: usize = 2;

/// How a prompted row is steered.
pub struct Steering {
    pub reward: &'static str,
    pub system: &'static str,
    pub strength: f32,
}

pub fn question(row: usize) -> &'static str {
    let count = QUESTIONS.lines().count();
    QUESTIONS.lines().nth(row % count).expect("the file has lines")
}

pub fn input(row: usize) -> Input {
    Input::Chat(vec![ChatMessage { role: "user".to_owned(), content: question(row).to_owned() }])
}

pub fn steering(row: usize) -> Steering {
    let (reward, system) = DEMO_PROMPTED[(row + FIRST_TEXT) % DEMO_PROMPTED.len()];
    Steering { reward, system, strength: STRENGTHS[row / DEMO_PROMPTED.len() % STRENGTHS.len()] }
}

/// The guidance of a row; `None`: it has none.
pub fn term(rows: Rows, row: usize, batch: usize) -> Option<GuidanceTerm> {
    let preference = |weight: f32| {
        vec![(synthetic::FIRST.to_owned(), weight), (synthetic::SECOND.to_owned(), 1.0 - weight)]
    };
    let adapter =
        |weight| GuidanceTerm { reward: ADAPTER.to_owned(), preference: preference(weight), strength: 1.0 };
    match rows {
        Rows::Unguided => None,
        Rows::Prompted => {
            let Steering { reward, strength, .. } = steering(row);
            Some(GuidanceTerm { reward: reward.to_owned(), preference: Vec::new(), strength })
        }
        Rows::One => Some(adapter(0.5)),
        Rows::Mixed => Some(adapter((row as f32 + 0.5) / batch as f32)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn sixteen_rows_have_sixteen_steerings_and_questions() {
        let steerings = (0..16).map(steering).map(|s| (s.reward, s.strength.to_bits()));
        assert_eq!(steerings.collect::<HashSet<_>>().len(), 16);
        assert_eq!((0..32).map(question).collect::<HashSet<_>>().len(), 32);
    }
}
