//! What a job has to do and what it has done: alone with its output, or one of several processes.

use std::ops::Range;

use crate::{job::JobError, ledger::Ledger};

/// Requests have numbers in the order of the input, as many for each line as the plan makes of it.
pub trait Book: Send {
    /// Whether requests of a line are missing here. Asked for the lines in their order.
    fn takes(&mut self, line: u64) -> impl Future<Output = Result<bool, JobError>> + Send;

    /// The number of a line's first request; 0 for a line before all that is taken.
    fn first_number(&self, line: u64) -> u64;

    fn is_done(&self, number: u64) -> bool;

    /// The oldest request that is to be answered here, and is not.
    fn oldest(&self) -> Option<u64>;

    fn record(&mut self, number: u64, failed: bool, line: String) -> Result<(), JobError>;

    /// Hands over what is complete.
    fn settle(&mut self) -> impl Future<Output = Result<(), JobError>> + Send;

    /// What follows when all lines were read and all that was taken is done.
    fn rest(&mut self) -> impl Future<Output = Result<Rest, JobError>> + Send;

    fn done(&self) -> u64;

    /// Of these, the ones that ended with an error.
    fn failed(&self) -> u64;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// The job is done.
    Done,
    /// Others left something undone: the lines are read again.
    Again,
    /// Others are at work on what is left.
    Wait,
}

/// The book of a process that has its output for itself.
pub struct Alone {
    ledger: Ledger,
    /// Its lines.
    own: Range<u64>,
    /// Requests of a line.
    width: u64,
}

// === impl Alone ===

impl Alone {
    pub fn new(ledger: Ledger, own: Range<u64>, width: u64) -> Self {
        Self { ledger, own, width }
    }

    /// Makes everything safe from a power cut.
    pub fn close(&mut self) -> Result<(), JobError> {
        Ok(self.ledger.close()?)
    }
}

impl Book for Alone {
    async fn takes(&mut self, line: u64) -> Result<bool, JobError> {
        let is_done = self.first_number(line) + self.width <= self.ledger.done_below();
        Ok(self.own.contains(&line) && !is_done)
    }

    fn first_number(&self, line: u64) -> u64 {
        line.saturating_sub(self.own.start) * self.width
    }

    fn is_done(&self, number: u64) -> bool {
        self.ledger.is_done(number)
    }

    fn oldest(&self) -> Option<u64> {
        Some(self.ledger.done_below())
    }

    fn record(&mut self, number: u64, failed: bool, line: String) -> Result<(), JobError> {
        Ok(self.ledger.record(number, failed, line)?)
    }

    async fn settle(&mut self) -> Result<(), JobError> {
        Ok(())
    }

    async fn rest(&mut self) -> Result<Rest, JobError> {
        Ok(Rest::Done)
    }

    fn done(&self) -> u64 {
        self.ledger.done()
    }

    fn failed(&self) -> u64 {
        self.ledger.failed()
    }
}
