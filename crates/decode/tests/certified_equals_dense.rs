//! A token chosen from lists and queries is the token that whole rows give: always, and usually without a
//! query.

use proptest::prelude::*;
use uniarm_decode::{
    Choice, Chooser, History, Noise, Position, Sampling, Term, TermLogits, TopList, choose_dense,
    guidance::weigh_base, noisy_top_list, top_list,
};

/// A position with everything that its lists leave out.
#[derive(Clone, Debug)]
struct Situation {
    base: Vec<f32>,
    base_strength: f32,
    rewards: Vec<Reward>,
    sampling: Sampling,
    prompt: Vec<u32>,
    answer: Vec<u32>,
    seed: u64,
    position: u32,
}

#[derive(Clone, Debug)]
struct Reward {
    strength: f32,
    row: Vec<f32>,
    /// Length of the list; `None` for a whole row.
    list: Option<usize>,
    /// The list is ranked with the noise, where there is one.
    noisy: bool,
}

#[derive(Debug, Default, PartialEq)]
struct Exchange {
    queries: usize,
    dense: bool,
}

impl Situation {
    fn dense(&self) -> u32 {
        let terms = self
            .rewards
            .iter()
            .map(|reward| Term { strength: reward.strength, logits: TermLogits::Dense(&reward.row) });
        let terms: Vec<Term<'_>> = terms.collect();
        let (b, zeros) = (self.base_strength, self.base_strength == 0.0);
        let weighed: Vec<f32> = self.base.iter().map(|z| if zeros { 0.0 } else { b * z }).collect();
        choose_dense(&self.position(&weighed, &terms, &self.history(), &self.noise()))
    }

    /// Plays the reward side: lists first, then what is asked for.
    fn certified(&self, chooser: &mut Chooser) -> (u32, Exchange) {
        let mut lists: Vec<Option<TopList>> =
            self.rewards.iter().map(|reward| reward.list.map(|k| self.list(reward, k))).collect();
        let mut exchange = Exchange::default();
        let mut weighed = Vec::new();
        let base = weigh_base(&self.base, self.base_strength, &mut weighed);
        loop {
            let terms: Vec<Term<'_>> = self
                .rewards
                .iter()
                .zip(&lists)
                .map(|(reward, list)| Term {
                    strength: reward.strength,
                    logits: list.as_ref().map_or(TermLogits::Dense(&reward.row), TermLogits::List),
                })
                .collect();
            match chooser.choose(&self.position(base, &terms, &self.history(), &self.noise())) {
                Choice::Token(token) => return (token, exchange),
                Choice::Query(ids) => {
                    assert!(ids.is_sorted_by(|a, b| a < b), "ids ascend");
                    assert!(!exchange.dense, "whole rows leave nothing to ask");
                    exchange.queries += 1;
                    self.answer(&ids, &mut lists);
                }
                Choice::Dense => {
                    assert!(!exchange.dense, "whole rows suffice");
                    exchange.dense = true;
                    lists.fill(None);
                }
            }
        }
    }

    /// The token from the `k` likeliest of the base model and the lists of the rewards, with what these are asked for;
    /// `None`: it takes the base model's row.
    fn by_lists(&self, chooser: &mut Chooser, k: usize) -> Option<u32> {
        let base = self.list_of(&self.base, self.base_strength, k);
        let mut lists: Vec<Option<TopList>> =
            self.rewards.iter().map(|reward| reward.list.map(|k| self.list(reward, k))).collect();
        loop {
            let rewards = self.rewards.iter().zip(&lists).map(|(reward, list)| Term {
                strength: reward.strength,
                logits: list.as_ref().map_or(TermLogits::Dense(&reward.row), TermLogits::List),
            });
            let base = Term { strength: self.base_strength, logits: TermLogits::List(&base) };
            let terms: Vec<Term<'_>> = std::iter::once(base).chain(rewards).collect();
            match chooser.choose_from_lists(&self.position(&[], &terms, &self.history(), &self.noise()))? {
                Choice::Token(token) => return Some(token),
                Choice::Query(ids) => self.answer(&ids, &mut lists),
                Choice::Dense => lists.fill(None),
            }
        }
    }

    /// Plays the reward side of a query.
    fn answer(&self, ids: &[u32], lists: &mut [Option<TopList>]) {
        let lacking = |list: &&TopList| ids.iter().any(|&id| list.get(id).is_none());
        assert!(lists.iter().flatten().any(|list| lacking(&list)), "a query asks for something new");
        for (reward, list) in self.rewards.iter().zip(lists) {
            let Some(list) = list else { continue };
            let ids: Vec<u32> = ids.iter().copied().filter(|&id| list.get(id).is_none()).collect();
            let values: Vec<f32> = ids.iter().map(|&id| reward.row[id as usize]).collect();
            list.add(&ids, &values);
        }
    }

    fn list(&self, reward: &Reward, k: usize) -> TopList {
        if reward.noisy { self.list_of(&reward.row, reward.strength, k) } else { top_list(&reward.row, k) }
    }

    fn list_of(&self, row: &[f32], strength: f32, k: usize) -> TopList {
        if self.sampling.temperature == 0.0 {
            return top_list(row, k);
        }
        noisy_top_list(row, k, strength / self.sampling.temperature, &self.noise(), self.position)
    }

    fn position<'a>(
        &'a self,
        base: &'a [f32],
        terms: &'a [Term<'a>],
        history: &'a History,
        noise: &'a Noise,
    ) -> Position<'a> {
        Position { base, terms, sampling: &self.sampling, history, noise, position: self.position }
    }

    fn history(&self) -> History {
        let mut history = History::new(&self.prompt);
        self.answer.iter().for_each(|&token| history.push(token));
        history
    }

    fn noise(&self) -> Noise {
        Noise::new(self.seed, 0)
    }
}

/// Logits of a language model in outline: a few large, most small; coarse ones tie often.
fn row(vocabulary: usize, odd: bool) -> impl Strategy<Value = Vec<f32>> {
    (any::<u64>(), 0.0_f32..6.0, prop_oneof![3 => Just(0.0_f32), 1 => Just(0.5)], 0_u32..8).prop_map(
        move |(seed, spread, step, oddities)| {
            let mut state = seed | 1;
            let mut draw = move || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                (state >> 40) as f32 / (1_u64 << 24) as f32
            };
            let mut row: Vec<f32> = (0..vocabulary)
                .map(|_| {
                    let z = spread * ((draw() + draw() + draw() - 1.5) * 2.0 + 2.0 * draw().powi(8));
                    if step > 0.0 { (z / step).round() * step } else { z }
                })
                .collect();
            if odd {
                for _ in 0..oddities {
                    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, -0.0];
                    row[(draw() * vocabulary as f32) as usize % vocabulary] =
                        values[(draw() * 6.0) as usize % 6];
                }
                if oddities == 7 {
                    row.fill(f32::NEG_INFINITY);
                }
            }
            row
        },
    )
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let off_or = |off: f32, on: std::ops::Range<f32>| prop_oneof![2 => Just(off), 1 => on];
    (
        prop_oneof![1 => Just(0.0_f32), 2 => Just(1.0), 2 => 0.05_f32..2.0, 1 => 2.0_f32..100.0],
        prop_oneof![2 => Just(0_u32), 1 => 1_u32..5, 1 => 5_u32..400],
        off_or(1.0, 0.01..1.0),
        off_or(0.0, 0.0..1.0),
        off_or(1.0, 0.5..2.0),
        off_or(0.0, -2.0..2.0),
        off_or(0.0, -1.0..1.0),
    )
        .prop_map(
            |(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)| {
                Sampling {
                    temperature,
                    top_k,
                    top_p,
                    min_p,
                    repetition_penalty,
                    presence_penalty,
                    frequency_penalty,
                }
            },
        )
}

fn situation(odd: bool) -> impl Strategy<Value = Situation> {
    prop_oneof![1 => 1_usize..64, 2 => 64_usize..400, 1 => 400_usize..1500].prop_flat_map(move |vocabulary| {
        let strength = prop_oneof![4 => Just(1.0_f32), 3 => 0.0_f32..3.0, 1 => Just(0.0), 1 => -1.0_f32..0.0];
        let base_strength = prop_oneof![3 => Just(1.0_f32), 1 => Just(0.0), 1 => Just(0.5), 1 => Just(2.0), 1 => 0.0_f32..100.0];
        let list = prop_oneof![1 => Just(None), 3 => (0_usize..8).prop_map(Some), 3 => (8_usize..100).prop_map(Some)];
        let reward = (strength, row(vocabulary, odd), list, any::<bool>())
            .prop_map(|(strength, row, list, noisy)| Reward { strength, row, list, noisy });
        let tokens = || proptest::collection::vec(0..vocabulary as u32, 0..30);
        (
            (row(vocabulary, odd), base_strength),
            proptest::collection::vec(reward, 0..4),
            sampling(),
            tokens(),
            tokens(),
            any::<u64>(),
            any::<u32>(),
        )
            .prop_map(|((base, base_strength), rewards, sampling, prompt, answer, seed, position)| Situation {
                base,
                base_strength,
                rewards,
                sampling,
                prompt,
                answer,
                seed,
                position,
            })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5_000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn lists_and_queries_choose_what_whole_rows_choose(situation in situation(false)) {
        let mut chooser = Chooser::new(situation.base.len());
        prop_assert_eq!(situation.certified(&mut chooser).0, situation.dense());
    }

    #[test]
    fn lists_of_all_models_choose_what_whole_rows_choose_or_say_that_they_cannot(
        situation in prop_oneof![3 => situation(false), 1 => situation(true)],
        k in 1_usize..200,
    ) {
        let mut chooser = Chooser::new(situation.base.len());
        if let Some(token) = situation.by_lists(&mut chooser, k) {
            prop_assert_eq!(token, situation.dense());
        }
    }

    #[test]
    fn logits_that_are_infinite_or_not_numbers_change_nothing_about_that(situation in situation(true)) {
        let mut chooser = Chooser::new(situation.base.len());
        prop_assert_eq!(situation.certified(&mut chooser).0, situation.dense());
    }
}

#[test]
fn where_base_and_reward_mostly_agree_lists_nearly_always_suffice() {
    const VOCABULARY: usize = 20_000;
    const POSITIONS: u32 = 200;
    let draws = |seed, position| {
        let mut row = vec![0.0; VOCABULARY];
        Noise::new(seed, 0).fill(position, &mut row);
        row
    };
    let samplings = [
        Sampling { temperature: 0.0, ..Sampling::default() },
        Sampling::default(),
        Sampling { top_p: 0.9, ..Sampling::default() },
        Sampling { top_k: 20, min_p: 0.01, repetition_penalty: 1.1, ..Sampling::default() },
        Sampling::default(),
    ];
    let noisy = [false, false, false, false, true];
    for (sampling, noisy) in samplings.into_iter().zip(noisy) {
        let mut chooser = Chooser::new(VOCABULARY);
        let (mut certified, mut without_rows) = (0, 0);
        for position in 0..POSITIONS {
            // Gumbel variables have the long upper tail of a language model's logits.
            let base: Vec<f32> = draws(1, position).into_iter().map(|g| 1.4 * g).collect();
            let other = draws(2, position);
            let reward = base.iter().zip(other).map(|(z, g)| 0.7 * z + 0.9 * g).collect();
            let situation = Situation {
                base,
                base_strength: 1.0,
                rewards: vec![Reward { strength: 1.0, row: reward, list: Some(32), noisy }],
                sampling,
                prompt: (0..50).collect(),
                answer: Vec::new(),
                seed: 3,
                position,
            };
            let (token, exchange) = situation.certified(&mut chooser);
            assert_eq!(token, situation.dense());
            certified += u32::from(exchange == Exchange::default());
            let from_lists = situation.by_lists(&mut chooser, 128);
            assert!(from_lists.is_none_or(|chosen| chosen == token));
            without_rows += u32::from(from_lists.is_some());
        }
        let share = f64::from(certified) / f64::from(POSITIONS);
        let listed = f64::from(without_rows) / f64::from(POSITIONS);
        println!("{listed:.3} chosen from a list of the base model's row too");
        assert!(listed >= if sampling.suits_lists() { 0.9 } else { 0.0 }, "only {listed} under {sampling:?}");
        println!("{share:.3} certified without a query, noisy ranking {noisy}, under {sampling:?}");
        assert!(share >= 0.9, "only {share} certified under {sampling:?}");
    }
}
