//! What a tenant has under way and has had lately, at this router.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;

/// Buckets refill evenly and hold what a minute gives.
const MINUTE: Duration = Duration::from_secs(60);

/// Of one tenant; it outlives changes of the file that names it.
#[derive(Debug)]
pub(super) struct Usage {
    pub(super) under_way: AtomicUsize,
    pub(super) requests: Mutex<Bucket>,
    pub(super) tokens: Mutex<Bucket>,
}

/// So many a minute, saved up for at most a minute. It starts full.
#[derive(Debug)]
pub(super) struct Bucket {
    /// What has been taken and has not grown back.
    taken: f64,
    at: Instant,
}

/// A tenant's request, until it is over.
#[derive(Debug, Default)]
pub(crate) struct Ticket(Option<Held>);

#[derive(Debug)]
struct Held {
    usage: Arc<Usage>,
    /// Tokens that were taken for it and that it has not had; 0 where they are not counted.
    tokens_left: u64,
}

// === impl Usage ===

impl Usage {
    pub(super) fn new() -> Self {
        Self {
            under_way: AtomicUsize::new(0),
            requests: Mutex::new(Bucket::new()),
            tokens: Mutex::new(Bucket::new()),
        }
    }

    /// One more under way, unless that would be more than `most`.
    pub(super) fn enter(&self, most: Option<usize>) -> bool {
        let most = most.unwrap_or(usize::MAX);
        let more = |under_way| (under_way < most).then_some(under_way + 1);
        self.under_way.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }
}

// === impl Bucket ===

impl Bucket {
    fn new() -> Self {
        Self { taken: 0.0, at: Instant::now() }
    }

    /// Takes `amount`, which is at most `per_minute`; or says how long it takes until that is there.
    pub(super) fn take(&mut self, amount: u64, per_minute: u32) -> Result<(), Duration> {
        let per_second = f64::from(per_minute) / MINUTE.as_secs_f64();
        let now = Instant::now();
        let grown = (now - self.at).as_secs_f64() * per_second;
        (self.taken, self.at) = ((self.taken - grown).max(0.0), now);
        let over = self.taken + amount as f64 - f64::from(per_minute);
        if over > 0.0 {
            return Err(Duration::from_secs_f64(over / per_second));
        }
        self.taken += amount as f64;
        Ok(())
    }

    pub(super) fn give_back(&mut self, amount: u64) {
        self.taken = (self.taken - amount as f64).max(0.0);
    }
}

// === impl Ticket ===

impl Ticket {
    /// `usage` has been entered.
    pub(super) fn new(usage: Arc<Usage>) -> Self {
        Self(Some(Held { usage, tokens_left: 0 }))
    }

    /// Takes tokens for it, or says how long it takes until they are there.
    pub(super) fn reserve(&mut self, tokens: u64, per_minute: u32) -> Result<(), Duration> {
        let Some(held) = &mut self.0 else { return Ok(()) };
        held.usage.tokens.lock().take(tokens, per_minute)?;
        held.tokens_left = tokens;
        Ok(())
    }

    /// So many tokens were written.
    pub(crate) fn spend(&mut self, tokens: u64) {
        if let Some(held) = &mut self.0 {
            held.tokens_left = held.tokens_left.saturating_sub(tokens);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let Some(held) = &self.0 else { return };
        held.usage.under_way.fetch_sub(1, Ordering::Relaxed);
        held.usage.tokens.lock().give_back(held.tokens_left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_holds_a_minute_and_says_when_there_is_more() {
        let mut bucket = Bucket::new();
        for _ in 0..60 {
            bucket.take(1, 60).unwrap();
        }
        assert_eq!(bucket.take(1, 60), Err(Duration::from_secs(1)));
        tokio::time::advance(Duration::from_secs(1)).await;
        bucket.take(1, 60).unwrap();
        assert!(bucket.take(1, 60).is_err());
        tokio::time::advance(Duration::from_secs(3600)).await;
        assert_eq!(bucket.take(60, 60), Ok(()), "a minute's worth, and no hour's");
        assert!(bucket.take(1, 60).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_gives_back_what_it_did_not_use() {
        let usage = Arc::new(Usage::new());
        assert!(usage.enter(Some(1)));
        assert!(!usage.enter(Some(1)), "one is the most");
        let mut ticket = Ticket::new(Arc::clone(&usage));
        ticket.reserve(100, 100).unwrap();
        ticket.spend(30);
        drop(ticket);
        assert!(usage.enter(Some(1)));
        assert!(usage.tokens.lock().take(71, 100).is_err());
        usage.tokens.lock().take(70, 100).unwrap();
    }
}
