//! A member's record as it is stored, and the numbers that tell one life of a member from the next.

use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message as _;
use uniarm_proto::{Member, MemberId, pb};

use crate::StoreError;

/// The record as protobuf bytes.
pub(crate) fn encode(member: &Member) -> Vec<u8> {
    pb::Member::from(member.clone()).encode_to_vec()
}

/// A record that another version of the product, or another hand, may have written.
pub(crate) fn decode(bytes: &[u8]) -> Result<Member, StoreError> {
    let wire = pb::Member::decode(bytes).map_err(|error| StoreError::InvalidMember(error.to_string()))?;
    wire.try_into().map_err(|error: uniarm_proto::ProtocolError| StoreError::InvalidMember(error.to_string()))
}

/// Refuses a record that its readers would refuse: the writer is the one who can tell its operator.
pub(crate) fn check(member: &Member) -> Result<(), StoreError> {
    decode(&encode(member)).map(|_| ())
}

pub(crate) fn check_id(id: &MemberId) -> Result<(), StoreError> {
    if id.0.is_empty() { Err(StoreError::InvalidMember("the id is empty".to_owned())) } else { Ok(()) }
}

/// The generation after `last`: the time in milliseconds, or one more than `last` where the clock has
/// not passed it. The store's memory alone would do, until the store is lost with its data; the
/// clock alone would do, until it is set back.
pub(crate) fn generation_after(last: u64, now: SystemTime) -> u64 {
    milliseconds(now).max(last + 1)
}

/// Since 1970.
pub(crate) fn milliseconds(now: SystemTime) -> u64 {
    let elapsed = now.duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_millis());
    u64::try_from(elapsed).unwrap_or(0)
}
