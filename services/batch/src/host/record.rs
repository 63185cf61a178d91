//! A batch as OpenAI's API shows it, and its states.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uniarm_openai::Call;

/// The only time that a batch may take, as OpenAI's clients name it.
pub const WINDOW: &str = "24h";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// All lines are read, and none is asked.
    Validating,
    InProgress,
    /// All lines are answered, and their files are written.
    Finalizing,
    Completed,
    /// A line was no request, or the disk was full: `errors` says which.
    Failed,
    Cancelling,
    Cancelled,
    Expired,
}

/// Who a batch or a file belongs to; empty: anybody. On disk, and not on the wire.
pub type Owner = String;

/// A batch on disk and on the wire; times are seconds since 1970.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchRecord {
    pub id: String,
    #[serde(default)]
    pub owner: Owner,
    pub endpoint: String,
    pub errors: Option<Errors>,
    pub input_file_id: String,
    pub completion_window: String,
    pub status: State,
    pub output_file_id: Option<String>,
    pub error_file_id: Option<String>,
    pub created_at: u64,
    pub in_progress_at: Option<u64>,
    pub expires_at: u64,
    pub finalizing_at: Option<u64>,
    pub completed_at: Option<u64>,
    pub failed_at: Option<u64>,
    pub expired_at: Option<u64>,
    pub cancelling_at: Option<u64>,
    pub cancelled_at: Option<u64>,
    pub request_counts: Counts,
    pub metadata: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub total: u64,
    pub completed: u64,
    pub failed: u64,
}

// === impl Counts ===

impl Counts {
    /// Lines that have neither answer nor error yet.
    pub fn left(&self) -> u64 {
        self.total.saturating_sub(self.completed + self.failed)
    }
}

/// Why a batch failed as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errors {
    pub data: Vec<BatchError>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchError {
    pub code: String,
    pub message: String,
    pub param: Option<String>,
    /// From 1.
    pub line: Option<u64>,
}

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct NewBatch {
    pub owner: Owner,
    pub input_file_id: String,
    pub call: Call,
    pub metadata: Option<Map<String, Value>>,
}

// === impl State ===

impl State {
    /// Nothing more will come of it.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::Expired)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

// === impl BatchError ===

impl BatchError {
    /// Of the process that keeps the batch, not of what was asked.
    pub fn of_host(message: String) -> Self {
        Self { code: "server_error".to_owned(), message, ..Self::default() }
    }
}

// === impl BatchRecord ===

impl BatchRecord {
    pub fn new(id: String, asked: NewBatch, now: u64, window_s: u64) -> Self {
        Self {
            id,
            owner: asked.owner,
            endpoint: asked.call.path().to_owned(),
            errors: None,
            input_file_id: asked.input_file_id,
            completion_window: WINDOW.to_owned(),
            status: State::Validating,
            output_file_id: None,
            error_file_id: None,
            created_at: now,
            in_progress_at: None,
            expires_at: now + window_s,
            finalizing_at: None,
            completed_at: None,
            failed_at: None,
            expired_at: None,
            cancelling_at: None,
            cancelled_at: None,
            request_counts: Counts::default(),
            metadata: asked.metadata,
        }
    }

    /// Goes into a state, and says since when.
    pub fn enter(&mut self, state: State, now: u64) {
        self.status = state;
        let since = match state {
            State::Validating => return,
            State::InProgress => &mut self.in_progress_at,
            State::Finalizing => &mut self.finalizing_at,
            State::Completed => &mut self.completed_at,
            State::Failed => &mut self.failed_at,
            State::Cancelling => &mut self.cancelling_at,
            State::Cancelled => &mut self.cancelled_at,
            State::Expired => &mut self.expired_at,
        };
        // A batch that a restart took through a state again is in it since the first time.
        since.get_or_insert(now);
    }

    pub fn as_json(&self) -> Value {
        let mut object = serde_json::to_value(self).expect("strings and numbers");
        object.as_object_mut().map(|fields| fields.remove("owner"));
        object["object"] = "batch".into();
        if self.errors.is_some() {
            object["errors"]["object"] = "list".into();
        }
        object
    }
}
