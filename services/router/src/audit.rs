//! Records of requests whose clients, or tenants, want them kept: what was asked, each token with what base and reward
//! models thought of it, and who computed it.
//!
//! `record` (what is kept of one request), `chain` (how records hang together, so that none can be changed or left out
//! unnoticed) and `journal` (the files, and the thread that writes them). `uniarm replay` reads them.

mod chain;
mod journal;
mod record;

pub use chain::{ChainError, GENESIS, Hash, Link};
pub use journal::{Journal, JournalError, files};
pub(crate) use record::Trail;
pub use record::{Answer, Record, ScorerRecord, ServedFrom};
