//! `uniarm bench choose`: what choosing a token and making a list cost, by vocabulary.

use std::{hint::black_box, time::Instant};

use serde::Serialize;
use uniarm_decode::{
    Choice, Chooser, History, Noise, Position, Sampling, Term, TermLogits, TopList, log_sum_exp,
    noisy_top_list, top_list,
};

use super::{args::BenchChooseArgs, statistics::bar};

/// Characters of the longest bar.
const BAR: usize = 16;

/// Tokens that penalties look at.
const HISTORY_TOKENS: u32 = 500;

const NOISE: Noise = Noise::new(7, 0);

#[derive(Serialize)]
struct Report {
    list_length: u32,
    rounds: u32,
    cases: Vec<Case>,
}

#[derive(Serialize)]
struct Case {
    what: String,
    vocabulary: usize,
    least_us: f64,
    median_us: f64,
}

/// Logits of one position.
struct Rows {
    base: Vec<f32>,
    reward: Vec<f32>,
}

/// Measures positions one after the other.
struct Clock {
    rounds: u32,
    cases: Vec<Case>,
}

pub fn run(args: &BenchChooseArgs) -> anyhow::Result<()> {
    let mut clock = Clock { rounds: args.rounds, cases: Vec::new() };
    for &vocabulary in &args.vocabulary {
        let rows = Rows::like_a_language_model(vocabulary);
        time_lists(&mut clock, &rows, args.list_length as usize);
        time_choices(&mut clock, &rows, args.list_length as usize);
    }
    let report = Report { list_length: args.list_length, rounds: args.rounds, cases: clock.cases };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report.print(&args.vocabulary);
    }
    Ok(())
}

/// The reward worker's part.
fn time_lists(clock: &mut Clock, rows: &Rows, length: usize) {
    let reward = &rows.reward;
    let mut noise = vec![0.0; reward.len()];
    clock.time("noise of a row", reward.len(), |position| NOISE.fill(position, black_box(&mut noise)));
    clock.time("log-sum-exp", reward.len(), |_| discard(log_sum_exp(reward)));
    clock.time("make a list", reward.len(), |_| discard(top_list(reward, length)));
    clock.time("make a list ranked with noise", reward.len(), |position| {
        discard(noisy_top_list(reward, length, 1.0, &NOISE, position));
    });
}

/// The base worker's part.
fn time_choices(clock: &mut Clock, rows: &Rows, length: usize) {
    let plain = Sampling::default();
    let samplings = [
        ("greedy", Sampling { temperature: 0.0, ..plain }),
        ("T = 1", plain),
        ("T = 1, top-k 50", Sampling { top_k: 50, ..plain }),
        ("T = 1, top-p 0.9", Sampling { top_p: 0.9, ..plain }),
        ("T = 1, min-p 0.05", Sampling { min_p: 0.05, ..plain }),
        ("T = 1, penalties", Sampling { repetition_penalty: 1.1, ..plain }),
    ];
    let history = History::new(&(0..HISTORY_TOKENS).collect::<Vec<u32>>());
    let vocabulary = rows.base.len();
    let mut chooser = Chooser::new(vocabulary);
    let mut choose = |sampling: &Sampling, logits: Option<TermLogits<'_>>, position: u32| {
        let term = logits.map(|logits| Term { strength: 1.0, logits });
        let verdict = chooser.choose(&Position {
            base: &rows.base,
            terms: term.as_slice(),
            sampling,
            history: &history,
            noise: &NOISE,
            position,
        });
        black_box(verdict)
    };
    let list = top_list(&rows.reward, length);
    for (name, sampling) in &samplings {
        clock.time(&format!("choose unguided, {name}"), vocabulary, |position| {
            assert!(matches!(choose(sampling, None, position), Choice::Token(_)));
        });
        clock.time(&format!("choose from a row, {name}"), vocabulary, |position| {
            discard(choose(sampling, Some(TermLogits::Dense(&rows.reward)), position));
        });
        clock.time(&format!("choose from a list, {name}"), vocabulary, |position| {
            discard(choose(sampling, Some(TermLogits::List(&list)), position));
        });
    }
    // Ranked for its own position, as a reward worker ranks it: made outside the clock.
    let lists: Vec<TopList> = (0..clock.rounds)
        .map(|position| noisy_top_list(&rows.reward, length, 1.0, &NOISE, position))
        .collect();
    clock.time("choose from a list ranked with noise, T = 1", vocabulary, |position| {
        discard(choose(&plain, Some(TermLogits::List(&lists[position as usize])), position));
    });
}

/// Keeps the compiler from skipping what nobody reads.
fn discard<T>(value: T) {
    let _ = black_box(value);
}

// === impl Clock ===

impl Clock {
    fn time(&mut self, what: &str, vocabulary: usize, mut run: impl FnMut(u32)) {
        let mut micros: Vec<f64> = (0..self.rounds)
            .map(|position| {
                let began = Instant::now();
                run(position);
                began.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        micros.sort_by(f64::total_cmp);
        let (least_us, median_us) = (micros[0], micros[micros.len() / 2]);
        self.cases.push(Case { what: what.to_owned(), vocabulary, least_us, median_us });
    }
}

// === impl Rows ===

impl Rows {
    /// Normal with deviation 2.5, a dozen logits far above, and in agreement about those.
    fn like_a_language_model(vocabulary: usize) -> Self {
        let mut draws = vec![0.0; 2 * vocabulary];
        Noise::new(1, 0).fill(0, &mut draws);
        // The difference of two Gumbel variables is logistic: close enough.
        let row = |draws: &[f32]| -> Vec<f32> {
            let mut row: Vec<f32> = draws.iter().rev().zip(draws).map(|(a, b)| 1.4 * (a - b)).collect();
            for (rank, index) in (0..vocabulary).step_by((vocabulary / 12).max(1)).enumerate() {
                row[index] = 16.0 - 0.7 * rank as f32 + 0.3 * draws[index];
            }
            row
        };
        let (base, reward) = draws.split_at(vocabulary);
        Self { base: row(base), reward: row(reward) }
    }
}

// === impl Report ===

impl Report {
    fn print(&self, vocabularies: &[usize]) {
        println!(
            "microseconds of a row, median of {} positions (least); one term of strength 1, lists of {}\n",
            self.rounds, self.list_length
        );
        let heads: Vec<String> = vocabularies.iter().map(|v| format!("{v:>17}")).collect();
        println!("{:44}{}", "vocabulary", heads.concat());
        let most = self.cases.iter().map(|case| case.median_us).fold(0.0, f64::max);
        let whats = self.cases.iter().take_while(|case| case.vocabulary == vocabularies[0]);
        for what in whats.map(|case| &case.what) {
            let of_it: Vec<&Case> = self.cases.iter().filter(|case| case.what == *what).collect();
            let cells: Vec<String> = of_it
                .iter()
                .map(|case| format!("{:>17}", format!("{:.1} ({:.1})", case.median_us, case.least_us)))
                .collect();
            let last = of_it.last().map_or(0.0, |case| case.median_us);
            println!("{what:44}{}  {}", cells.concat(), bar(last, most, BAR));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_timed_for_every_vocabulary() {
        let mut clock = Clock { rounds: 2, cases: Vec::new() };
        for vocabulary in [1000, 2000] {
            let rows = Rows::like_a_language_model(vocabulary);
            time_lists(&mut clock, &rows, 8);
            time_choices(&mut clock, &rows, 8);
        }
        let (small, large) = clock.cases.split_at(clock.cases.len() / 2);
        assert!(small.iter().map(|case| &case.what).eq(large.iter().map(|case| &case.what)));
        assert!(clock.cases.iter().all(|case| case.least_us <= case.median_us));
    }
}
