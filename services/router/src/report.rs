//! The cluster as this router sees it, for operators.

use std::sync::Arc;

use tokio::time::Instant;
use tonic::{Request, Response, Status};
use uniarm_proto::{
    Member,
    pb::{
        self,
        status_server::{Status as Report, StatusServer},
    },
};

use crate::{
    place::Loads as _,
    relay::Relay,
    server::{RouterService, authorization},
};

impl RouterService {
    pub fn status_server(&self) -> StatusServer<Self> {
        StatusServer::new(self.clone())
    }

    /// The cluster as this router sees it.
    pub(crate) fn overview(&self) -> pb::ReportResponse {
        report(&self.relay)
    }
}

#[tonic::async_trait]
impl Report for RouterService {
    async fn report(
        &self,
        request: Request<pb::ReportRequest>,
    ) -> Result<Response<pb::ReportResponse>, Status> {
        self.identify(authorization(request.metadata()))?;
        Ok(Response::new(self.overview()))
    }
}

fn report(relay: &Relay) -> pb::ReportResponse {
    let snapshot = Arc::clone(&relay.members.borrow());
    let sick = relay.circuits.lock().sick(Instant::now(), &snapshot);
    let of = |member: &Arc<Member>| pb::MemberReport {
        under_way: relay.loads.under_way(&member.id) as u32,
        left_alone: sick.contains(&member.id),
        member: Some(Member::clone(member).into()),
    };
    let gone = |(id, under_way)| pb::Leaving { id: format!("{id}"), under_way: under_way as u32 };
    let busy = relay.loads.busy().into_iter().filter(|(id, _)| snapshot.get(id).is_none());
    let mut leaving: Vec<_> = busy.map(gone).collect();
    leaving.sort_by(|a, b| a.id.cmp(&b.id));
    pb::ReportResponse {
        revision: snapshot.revision(),
        members: snapshot.members().iter().map(of).collect(),
        leaving,
    }
}
