//! The least time that a step can take: bytes of weights over bandwidth, operations over peak.

use serde::Serialize;
use uniarm_model::{Config, Llama, machine};

/// What the machine does undisturbed, measured just before.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Machine {
    pub threads_per_worker: usize,
    /// Bytes per second that one worker's threads stream alone.
    pub stream_bytes_per_second: f64,
    /// The same for two workers together.
    pub stream_bytes_per_second_together: f64,
    /// f32 operations per second of one worker's threads.
    pub operations_per_second: f64,
}

/// What a model asks of it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Work {
    /// Bytes of weights that every step reads.
    pub weight_bytes: f64,
    /// Operations of one token, attention left out.
    pub token_operations: f64,
}

// === impl Machine ===

impl Machine {
    /// It takes about a second, in which nothing else should run.
    pub async fn measure(threads: usize) -> anyhow::Result<Self> {
        eprintln!("measuring the machine ({threads} thread(s) for each worker)");
        let measuring = tokio::task::spawn_blocking(move || Self {
            threads_per_worker: threads,
            stream_bytes_per_second: machine::stream_bytes_per_second(threads),
            stream_bytes_per_second_together: machine::stream_bytes_per_second(2 * threads),
            operations_per_second: machine::arithmetic_per_second(threads),
        });
        Ok(measuring.await?)
    }

    /// Tokens per second that no step of `batch` rows can exceed. Guided: base and reward worker step at the same
    /// time, each on threads of its own; here they share one copy of the weights, which is read once at best.
    pub fn tokens_per_second(&self, work: Work, batch: usize, guided: bool) -> f64 {
        let stream =
            if guided { self.stream_bytes_per_second_together } else { self.stream_bytes_per_second };
        let reading = work.weight_bytes / stream;
        let computing = batch as f64 * work.token_operations / self.operations_per_second;
        batch as f64 / reading.max(computing)
    }

    pub fn line(&self) -> String {
        format!(
            "machine: {} thread(s) for each worker; {:.1} GB/s alone, {:.1} GB/s for two workers; {:.0} GFLOP/s each",
            self.threads_per_worker,
            self.stream_bytes_per_second / 1e9,
            self.stream_bytes_per_second_together / 1e9,
            self.operations_per_second / 1e9
        )
    }
}

// === impl Work ===

impl Work {
    pub fn of(llama: &Llama) -> Self {
        Self {
            weight_bytes: llama.weight_bytes() as f64,
            // A multiply-add for each weight of a matrix.
            token_operations: 2.0 * matrix_weights(llama.config()) as f64,
        }
    }

    pub fn line(&self, model: &str) -> String {
        format!(
            "{model}: a step reads {:.0} MB of weights, a token takes {:.2} GFLOP",
            self.weight_bytes / 1e6,
            self.token_operations / 1e9
        )
    }
}

/// Weights that a token is multiplied with; of the embedding it reads a row.
fn matrix_weights(config: &Config) -> usize {
    let Config { hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary, .. } = config;
    let attention = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden;
    layers * (attention + 3 * hidden * intermediate) + vocabulary * hidden
}
