//! The gRPC edge of a base worker.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt as _};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use uniarm_proto::{
    Event, Member, Placed, Refusal, deadline,
    limits::WORKER_MESSAGE_BYTES_MAX,
    pb::{
        self,
        base_server::{Base, BaseServer},
        membership_server::{Membership, MembershipServer},
    },
};

use crate::handle::BaseHandle;

/// Serves `Base` and `Membership` for one engine.
#[derive(Clone)]
pub struct BaseService {
    handle: BaseHandle,
    member: Arc<Member>,
}

// === impl BaseService ===

impl BaseService {
    pub fn new(handle: BaseHandle, member: Member) -> Self {
        Self { handle, member: Arc::new(member) }
    }

    pub fn base_server(&self) -> BaseServer<Self> {
        BaseServer::new(self.clone())
            .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(WORKER_MESSAGE_BYTES_MAX)
    }

    pub fn membership_server(&self) -> MembershipServer<Self> {
        MembershipServer::new(self.clone())
    }
}

#[tonic::async_trait]
impl Base for BaseService {
    type RunStream = Pin<Box<dyn Stream<Item = Result<pb::GenerateResponse, Status>> + Send>>;

    async fn run(&self, request: Request<pb::RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let timeout = deadline::timeout(request.metadata()).map_err(Refusal::from)?;
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let placed = Placed::try_from(request.into_inner()).map_err(Refusal::from)?;
        if placed.generation != self.member.generation {
            let message = format!(
                "placed on generation {} of {}, this is {}",
                placed.generation, self.member.id, self.member.generation
            );
            return Err(Refusal::unavailable("stale_generation", message).into());
        }
        let events = self.handle.run(placed, deadline).await?;
        let member = Arc::clone(&self.member);
        let events = ReceiverStream::new(events).map(move |event| match event {
            Ok(event) => Ok(pb::GenerateResponse { event: Some(signed(event, &member)) }),
            Err(refusal) => Err(refusal.into()),
        });
        Ok(Response::new(Box::pin(events)))
    }
}

/// The engine does not know the name that it goes by.
fn signed(mut event: Event, member: &Member) -> Event {
    if let Event::Tokens(pb::Tokens { served: Some(pb::Served { base: Some(base), .. }), .. }) = &mut event {
        base.member = member.id.to_string();
        base.generation = member.generation.0;
    }
    event
}

#[tonic::async_trait]
impl Membership for BaseService {
    async fn describe(&self, _: Request<pb::DescribeRequest>) -> Result<Response<pb::Member>, Status> {
        Ok(Response::new(Member::clone(&self.member).into()))
    }
}
