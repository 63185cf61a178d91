//! The least time that a step can take: bytes of weights over bandwidth, operations over peak.

use serde::Serialize;
use uniarm_model::{Llama, Operations, machine};

use super::statistics::Spread;
use crate::worker::BLOCK_TOKENS;

/// What the machine does at most.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Machine {
    pub threads_per_worker: usize,
    /// Bytes per second that one worker's threads stream alone.
    pub stream_bytes_per_second: f64,
    /// The same for two workers together.
    pub stream_bytes_per_second_together: f64,
    /// Operations per second of one worker's threads, in f32 and with the integers of quantised weights.
    pub float_operations_per_second: f64,
    pub integer_operations_per_second: f64,
}

/// What a model asks of it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Work {
    /// Bytes of weights that every step reads.
    pub weight_bytes: f64,
    /// Bytes of keys and values that attention reads of each position before a token.
    pub position_bytes: f64,
    /// Operations of a token whose logits are wanted, attention left out.
    pub token: Count,
    /// The same of a token whose logits are not: a prompt's, but for its last.
    pub prompt_token: Count,
    /// Operations of a token's attention to one position.
    pub attention: Count,
}

/// Multiplications and additions, by the kind of arithmetic.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Count {
    pub float: f64,
    pub integer: f64,
}

// === impl Machine ===

impl Machine {
    /// One look: about a second, in which nothing else should run. What is measured is compared with the look just before,
    /// since a machine that others use too changes from minute to minute.
    pub async fn look(threads: usize) -> anyhow::Result<Self> {
        let measuring = tokio::task::spawn_blocking(move || Self {
            threads_per_worker: threads,
            stream_bytes_per_second: machine::stream_bytes_per_second(threads),
            stream_bytes_per_second_together: machine::stream_bytes_per_second(2 * threads),
            float_operations_per_second: machine::arithmetic_per_second(threads),
            integer_operations_per_second: machine::integer_arithmetic_per_second(threads),
        });
        Ok(measuring.await?)
    }

    /// The median of some looks, each number by itself.
    pub fn median(looks: &[Self]) -> Self {
        let median = |number: fn(&Self) -> f64| Spread::of(looks.iter().map(number).collect()).median;
        Self {
            threads_per_worker: looks[0].threads_per_worker,
            stream_bytes_per_second: median(|look| look.stream_bytes_per_second),
            stream_bytes_per_second_together: median(|look| look.stream_bytes_per_second_together),
            float_operations_per_second: median(|look| look.float_operations_per_second),
            integer_operations_per_second: median(|look| look.integer_operations_per_second),
        }
    }

    /// Tokens per second that no step of `batch` rows can exceed. Guided: base and reward worker step at the same
    /// time, each on threads of its own; here they share one copy of the weights, which is read once at best.
    pub fn tokens_per_second(&self, work: Work, batch: usize, guided: bool) -> f64 {
        let stream =
            if guided { self.stream_bytes_per_second_together } else { self.stream_bytes_per_second };
        let reading = work.weight_bytes / stream;
        batch as f64 / reading.max(batch as f64 * self.seconds(work.token))
    }

    /// Of computing at the peak.
    pub fn seconds(&self, operations: Count) -> f64 {
        operations.float / self.float_operations_per_second
            + operations.integer / self.integer_operations_per_second
    }

    pub fn line(&self) -> String {
        format!(
            "machine: {} thread(s) for each worker; {:.1} GB/s alone, {:.1} GB/s for two workers; {:.0} GFLOP/s in f32 and \
             {:.0} Gop/s in integers each",
            self.threads_per_worker,
            self.stream_bytes_per_second / 1e9,
            self.stream_bytes_per_second_together / 1e9,
            self.float_operations_per_second / 1e9,
            self.integer_operations_per_second / 1e9
        )
    }
}

// === impl Work ===

impl Work {
    pub fn of(llama: &Llama) -> Self {
        let (all, head) = (llama.operations(), llama.head_operations());
        let body = Operations { float: all.float - head.float, integer: all.integer - head.integer };
        Self {
            weight_bytes: llama.weight_bytes() as f64,
            position_bytes: llama.block_bytes() as f64 / BLOCK_TOKENS as f64,
            token: Count::of(all),
            prompt_token: Count::of(body),
            attention: Count::of(llama.attention_operations()),
        }
    }

    /// Operations of a prompt, each token of which attends to itself and to those before it.
    pub fn prompt(&self, tokens: usize) -> Count {
        let tokens = tokens as f64;
        let pairs = 0.5 * tokens * (tokens + 1.0);
        let sum =
            |number: fn(&Count) -> f64| tokens * number(&self.prompt_token) + pairs * number(&self.attention);
        Count { float: sum(|count| count.float), integer: sum(|count| count.integer) }
    }

    pub fn line(&self, model: &str) -> String {
        let megabytes = self.weight_bytes / 1e6;
        let (float, integer) = (self.token.float / 1e9, self.token.integer / 1e9);
        format!(
            "{model}: a step reads {megabytes:.0} MB of weights; a token takes {integer:.3} Gop in integers, {float:.3} GFLOP in f32"
        )
    }
}

// === impl Count ===

impl Count {
    fn of(operations: Operations) -> Self {
        Self { float: operations.float as f64, integer: operations.integer as f64 }
    }
}
