//! Many requests to a cluster, none lost and none twice: batches of lines, and the parts that other jobs share.
//!
//! Because a token is a function of models, request and position, a job that is killed and continued ends with the
//! bytes of an undisturbed one.

mod answer;
mod append_log;
mod book;
mod digest;
mod drive;
mod failure;
pub mod host;
mod job;
mod ledger;
mod openai;
mod output;
mod pace;
mod preferences;
mod private;
mod request;
mod shared;
mod source;
mod tally;

pub use append_log::{AppendLog, LogError};
pub use digest::{checksum, hexadecimal, seed};
pub use drive::{ATTEMPTS_MAX, Away, Cluster, Done, Drive, DriveOptions, PATIENCE, field_hint};
pub use job::{JobError, JobOptions, Part, Progress, run, run_shared};
pub use ledger::journal_path;
pub use output::Order;
pub use pace::Pace;
pub use preferences::{Preference, Preferences, PreferencesError, lattice};
pub use private::make_folder as make_private_folder;
pub use request::{Label, Plan, Planned, Unread};
pub use source::{LINE_BYTES_MAX, Line, Lines, Place, STANDARD_INPUT, Source, SourceError};
pub use tally::{Ends, Tally};
