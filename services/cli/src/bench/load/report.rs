//! What a load measurement says: latencies, and how much of the work was worth having.

use serde::Serialize;

use super::Outcome;
use crate::bench::{
    args::BenchLoadArgs,
    statistics::{Percentiles, bar},
};

/// Characters of the longest bar.
const BAR: usize = 20;

#[derive(Serialize)]
pub struct Report {
    seed: u64,
    seconds: f64,
    prompt_tokens: (u32, u32),
    answer_tokens: (u32, u32),
    guided_share: f64,
    first_token_ms_max: f64,
    next_token_ms_max: f64,
    rates: Vec<Rate>,
}

#[derive(Serialize)]
struct Rate {
    requests_per_second: f64,
    requests: usize,
    refused: usize,
    failed: usize,
    /// The first failure in words.
    failure: Option<String>,
    /// Until the last answer ended.
    seconds: f64,
    tokens_per_second: f64,
    first_token_ms: Option<Percentiles>,
    /// Between two tokens of an answer; tokens that come together are no time apart.
    next_token_ms: Option<Percentiles>,
    /// Requests within both limits, of all that came.
    good_share: f64,
    good_requests_per_second: f64,
    good_tokens_per_second: f64,
}

/// Arrival of each token of an answer, in seconds from the time at which the request was due.
pub struct Served {
    pub times: Vec<f64>,
}

// === impl Served ===

impl Served {
    fn first_ms(&self) -> f64 {
        self.times.first().map_or(f64::INFINITY, |first| 1e3 * first)
    }

    /// Mean over the answer: with drafts, tokens come in bursts, and a reader sees the mean.
    fn mean_next_ms(&self) -> f64 {
        match self.times.as_slice() {
            [first, .., last] => 1e3 * (last - first) / (self.times.len() - 1) as f64,
            _ => 0.0,
        }
    }
}

// === impl Report ===

impl Report {
    pub fn new(args: &BenchLoadArgs) -> Self {
        Self {
            seed: args.seed,
            seconds: args.seconds,
            prompt_tokens: (*args.prompt_tokens.start(), *args.prompt_tokens.end()),
            answer_tokens: (*args.answer_tokens.start(), *args.answer_tokens.end()),
            guided_share: args.guided,
            first_token_ms_max: args.first_token_ms,
            next_token_ms_max: args.next_token_ms,
            rates: Vec::new(),
        }
    }

    /// `seconds`: from the first arrival's clock to the end of the last answer.
    pub fn add(&mut self, requests_per_second: f64, outcomes: &[Outcome], seconds: f64) {
        let served: Vec<&Served> = outcomes
            .iter()
            .filter_map(|outcome| if let Outcome::Served(served) = outcome { Some(served) } else { None })
            .collect();
        let failures: Vec<&String> = outcomes
            .iter()
            .filter_map(|outcome| if let Outcome::Failed(why) = outcome { Some(why) } else { None })
            .collect();
        let good: Vec<&&Served> = served
            .iter()
            .filter(|s| s.first_ms() <= self.first_token_ms_max && s.mean_next_ms() <= self.next_token_ms_max)
            .collect();
        let gaps = served.iter().flat_map(|s| s.times.windows(2)).map(|pair| 1e3 * (pair[1] - pair[0]));
        self.rates.push(Rate {
            requests_per_second,
            requests: outcomes.len(),
            refused: outcomes.len() - served.len() - failures.len(),
            failed: failures.len(),
            failure: failures.first().map(|why| (*why).clone()),
            seconds,
            tokens_per_second: served.iter().map(|s| s.times.len()).sum::<usize>() as f64 / seconds,
            first_token_ms: Percentiles::of(served.iter().map(|s| s.first_ms()).collect()),
            next_token_ms: Percentiles::of(gaps.collect()),
            good_share: good.len() as f64 / outcomes.len().max(1) as f64,
            good_requests_per_second: good.len() as f64 / seconds,
            good_tokens_per_second: good.iter().map(|s| s.times.len()).sum::<usize>() as f64 / seconds,
        });
    }

    pub fn print(&self) {
        println!(
            "open loop, Poisson arrivals for {} s at each rate (seed {}); prompts of {} to {} tokens, answers of {} to {}; \
             {:.0} % guided",
            self.seconds,
            self.seed,
            self.prompt_tokens.0,
            self.prompt_tokens.1,
            self.answer_tokens.0,
            self.answer_tokens.1,
            100.0 * self.guided_share
        );
        println!(
            "good: the first token within {} ms, and at most {} ms for each further one, on average\n",
            self.first_token_ms_max, self.next_token_ms_max
        );
        println!(
            "{:>10} {:>8} {:>7} {:>6} {:>9} {:>26} {:>26} {:>7} {:>11} {:>13}",
            "requests/s",
            "requests",
            "refused",
            "failed",
            "tokens/s",
            "first token, ms 50/90/99",
            "next token, ms 50/90/99",
            "good",
            "good req/s",
            "good tokens/s"
        );
        let most =
            self.rates.iter().map(|rate| rate.good_tokens_per_second).fold(f64::MIN_POSITIVE, f64::max);
        for rate in &self.rates {
            println!(
                "{:>10} {:>8} {:>7} {:>6} {:>9.1} {:>26} {:>26} {:>5.0} % {:>11.2} {:>13.1}  {}",
                rate.requests_per_second,
                rate.requests,
                rate.refused,
                rate.failed,
                rate.tokens_per_second,
                cell(rate.first_token_ms),
                cell(rate.next_token_ms),
                100.0 * rate.good_share,
                rate.good_requests_per_second,
                rate.good_tokens_per_second,
                bar(rate.good_tokens_per_second, most, BAR)
            );
        }
        for rate in &self.rates {
            if let Some(why) = &rate.failure {
                println!("\nat {} requests/s: {why}", rate.requests_per_second);
            }
        }
    }
}

fn cell(percentiles: Option<Percentiles>) -> String {
    percentiles.map_or("–".to_owned(), |p| format!("{:.0} / {:.0} / {:.0}", p.p50, p.p90, p.p99))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::{
        args::{Cli, Command},
        bench::args::{BenchArgs, BenchCommand},
    };

    #[test]
    fn goodput_counts_what_came_in_time_and_the_json_says_so() {
        let line = "uniarm bench load --first-token-ms 100 --next-token-ms 20";
        let Command::Bench(BenchArgs { command: BenchCommand::Load(args) }) =
            Cli::parse_from(line.split(' ')).command
        else {
            panic!("another command")
        };
        let served = |times: &[f64]| Outcome::Served(Served { times: times.to_vec() });
        let outcomes = [
            served(&[0.05, 0.06, 0.08]),
            served(&[0.2, 0.21, 0.22]), // the first token is late
            served(&[0.05, 0.15]),      // the second is
            Outcome::Refused,
            Outcome::Failed("Unavailable: away".to_owned()),
        ];
        let mut report = Report::new(&args);
        report.add(2.0, &outcomes, 2.0);
        let json = serde_json::to_value(&report).unwrap();
        let rate = &json["rates"][0];
        assert_eq!((&rate["requests"], &rate["refused"], &rate["failed"]), (&5.into(), &1.into(), &1.into()));
        assert_eq!(rate["good_requests_per_second"], 0.5);
        assert_eq!(rate["good_tokens_per_second"], 1.5);
        assert_eq!(rate["tokens_per_second"], 4.0);
        assert_eq!(rate["first_token_ms"]["p99"], 200.0);
        assert_eq!(rate["failure"], "Unavailable: away");
    }
}
