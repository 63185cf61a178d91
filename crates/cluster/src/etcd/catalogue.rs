//! Changes of the catalogue: each is one transaction over one record, so that two at once cannot both count the same version.

use std::time::SystemTime;

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};
use uniarm_proto::AdapterRecord;

use super::keys::Keys;
use super::session::Session;
use crate::adapters::{self, NewAdapter};
use crate::{StoreError, record};

pub(super) async fn put(
    session: &Session,
    keys: &Keys,
    adapter: &NewAdapter,
) -> Result<AdapterRecord, StoreError> {
    // Somebody else may put the last name that has room at the same moment: that one more does no harm.
    adapters::check(adapter, others(session, keys, &adapter.name).await?)?;
    let now_ms = record::milliseconds(SystemTime::now());
    change(session, &keys.adapter(&adapter.name), |former| Ok(adapters::put(former, adapter, now_ms))).await
}

pub(super) async fn remove(session: &Session, keys: &Keys, name: &str) -> Result<AdapterRecord, StoreError> {
    let now_ms = record::milliseconds(SystemTime::now());
    change(session, &keys.adapter(name), |former| adapters::remove(former, name, now_ms)).await
}

/// Replaces a record by what `decide` makes of it (`None`: it stays), if nobody else has changed it meanwhile.
async fn change(
    session: &Session,
    key: &str,
    decide: impl FnOnce(Option<&AdapterRecord>) -> Result<Option<AdapterRecord>, StoreError>,
) -> Result<AdapterRecord, StoreError> {
    let found = session.request(|mut client| async move { client.get(key, None).await }).await?;
    let found = found.kvs().first();
    // One that cannot be read is not written over: its versions would begin anew.
    let former = found.map(|kv| adapters::decode(kv.value())).transpose()?;
    let mod_revision = found.map_or(0, |kv| kv.mod_revision());
    let Some(next) = decide(former.as_ref())? else {
        return Ok(former.expect("only what is there stays as it was"));
    };
    let replace = Txn::new()
        .when([Compare::mod_revision(key, CompareOp::Equal, mod_revision)])
        .and_then([TxnOp::put(key, adapters::encode(&next), None)]);
    let answer = session.request(|mut client| async move { client.txn(replace).await }).await?;
    match answer.succeeded() {
        true => Ok(next),
        false => Err(StoreError::Unavailable("somebody else changed it at the same moment".to_owned())),
    }
}

/// Names besides `name` that are not removed.
async fn others(session: &Session, keys: &Keys, name: &str) -> Result<usize, StoreError> {
    let prefix = keys.adapters();
    let all = GetOptions::new().with_prefix();
    let listed = session.request(|mut client| async move { client.get(prefix, Some(all)).await }).await?;
    let records = listed.kvs().iter().filter_map(|kv| adapters::decode(kv.value()).ok());
    Ok(records.filter(|record| record.name != name && !record.is_removed()).count())
}
