//! The gRPC edge: wire messages become operations, replies become wire messages.

use std::{pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt as _};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uniarm_proto::{
    Member, Refusal, ReplyBatch, SessionReply,
    limits::{SESSION_OPS_MAX, WORKER_MESSAGE_BYTES_MAX},
    pb::{
        self,
        membership_server::{Membership, MembershipServer},
        reward_server::{Reward, RewardServer},
    },
    session::{op_from_wire, reply_to_wire},
};

use crate::handle::{IncomingOp, RewardHandle};

/// Serves `Reward` and `Membership` for one engine.
#[derive(Clone)]
pub struct RewardService {
    handle: RewardHandle,
    member: Arc<Member>,
}

/// A message of a base worker.
struct Incoming {
    ops: Vec<IncomingOp>,
    lane: Option<pb::LaneOffer>,
}

// === impl RewardService ===

impl RewardService {
    pub fn new(handle: RewardHandle, member: Member) -> Self {
        Self { handle, member: Arc::new(member) }
    }

    pub fn reward_server(&self) -> RewardServer<Self> {
        RewardServer::new(self.clone())
            .max_decoding_message_size(WORKER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(WORKER_MESSAGE_BYTES_MAX)
    }

    pub fn membership_server(&self) -> MembershipServer<Self> {
        MembershipServer::new(self.clone())
    }
}

#[tonic::async_trait]
impl Reward for RewardService {
    type ExchangeStream = Pin<Box<dyn Stream<Item = Result<pb::RewardReply, Status>> + Send>>;

    async fn exchange(
        &self,
        request: Request<Streaming<pb::RewardRequest>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let (peer, member) = (request.remote_addr(), Arc::clone(&self.member));
        let mut requests = request.into_inner();
        let (mut connection, replies) = self.handle.connect();
        tracing::info!(?peer, "a base worker connected");
        tokio::spawn(async move {
            // The connection is dropped at the end, and with it all its sessions.
            while let Some(message) = requests.next().await {
                match message.map(incoming) {
                    Ok(Some(Incoming { ops, lane })) => {
                        if let Some(offer) = lane {
                            connection.take_lane(offer.nccl_id.into());
                        }
                        connection.submit(ops).await;
                    }
                    Ok(None) => {
                        tracing::warn!(?peer, limit = SESSION_OPS_MAX, "a message with too many operations");
                        break;
                    }
                    Err(status) => {
                        tracing::info!(?peer, %status, "the stream of a base worker ended");
                        break;
                    }
                }
            }
        });
        let replies = UnboundedReceiverStream::new(replies).map(move |batch| Ok(to_wire(batch, &member)));
        Ok(Response::new(Box::pin(replies.chain(engine_gone()))))
    }
}

#[tonic::async_trait]
impl Membership for RewardService {
    async fn describe(&self, _: Request<pb::DescribeRequest>) -> Result<Response<pb::Member>, Status> {
        let member = Member::clone(&self.member);
        Ok(Response::new(self.handle.catalogue().describe(member).into()))
    }
}

/// The stream ends by itself only if the engine did.
fn engine_gone() -> impl Stream<Item = Result<pb::RewardReply, Status>> {
    futures_util::stream::once(async {
        Err(Refusal::unavailable("engine_stopped", "the reward engine stopped").into())
    })
}

/// `None`: more operations than any base worker has reason to send.
fn incoming(message: pb::RewardRequest) -> Option<Incoming> {
    if message.ops.len() > SESSION_OPS_MAX {
        return None;
    }
    let known = |op| {
        let (session, generation, op) = op_from_wire(op);
        op.transpose().map(|op| (session, generation, op))
    };
    Some(Incoming { ops: message.ops.into_iter().filter_map(known).collect(), lane: message.lane })
}

/// Opened sessions say whose they are.
fn to_wire(batch: ReplyBatch, member: &Member) -> pb::RewardReply {
    let reply = |(session, generation, mut reply): (_, _, SessionReply)| {
        if let SessionReply::Opened { worker, .. } = &mut reply {
            *worker = Some((member.id.clone(), member.generation));
        }
        reply_to_wire(session, generation, reply)
    };
    pb::RewardReply {
        replies: batch.replies.into_iter().map(reply).collect(),
        load: batch.load.map(Into::into),
        lane: batch.lane.map(Into::into),
    }
}
