//! The least time that a step can take: bytes of weights over bandwidth, operations over peak.

use uniarm_model::{Operations, machine};

/// What the machine does undisturbed, measured just before.
pub struct Machine {
    pub threads: usize,
    /// Bytes per second that one worker's threads stream alone.
    pub stream: f64,
    /// The same for two workers together.
    pub stream_together: f64,
    /// Operations per second of one worker's threads, in f32 and with the integers of quantised weights.
    pub float_arithmetic: f64,
    pub integer_arithmetic: f64,
}

/// What a model asks of it.
#[derive(Clone, Copy)]
pub struct Work {
    /// Bytes of weights that every step reads.
    pub weight_bytes: f64,
    /// Operations of one token, attention left out.
    pub token_operations: Operations,
}

// === impl Machine ===

impl Machine {
    pub fn measure(threads: usize) -> Self {
        Self {
            threads,
            stream: machine::stream_bytes_per_second(threads),
            stream_together: machine::stream_bytes_per_second(2 * threads),
            float_arithmetic: machine::arithmetic_per_second(threads),
            integer_arithmetic: machine::integer_arithmetic_per_second(threads),
        }
    }

    /// Tokens per second that no step of `batch` rows can exceed. Guided: base and reward worker step at the same
    /// time, each on threads of its own; here they share one copy of the weights, which is read once at best.
    pub fn tokens_per_second(&self, work: Work, batch: usize, guided: bool) -> f64 {
        let stream = if guided { self.stream_together } else { self.stream };
        let reading = work.weight_bytes / stream;
        let Operations { float, integer } = work.token_operations;
        let computing = float as f64 / self.float_arithmetic + integer as f64 / self.integer_arithmetic;
        batch as f64 / reading.max(batch as f64 * computing)
    }
}
