//! One worker of several processes: how they find each other, and what each does when another one is lost.
//!
//! Rank 0 is the worker that everybody else sees. The others compute their part of its steps; when the group is over they
//! keep their weights and wait for the next one. Rank 0 hands its streams over and ends, with an error: whoever starts it
//! again begins the next group.

use std::{
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::sync::oneshot;
use uniarm_base::{GrpcScorer, StoreScorer};
use uniarm_cluster::{MemberStore, StoreAddress};
use uniarm_collective::{Collective, Group, Nccl, Payload, RANKS_MAX, Tcp, Wires};
use uniarm_model::{Adapter, Leader, ModelError, ModelFiles, Part, Shard};
use uniarm_proto::{Generation, Member, MemberId, Role};
use uniarm_reward::AdapterFollower;
use uniarm_tls::RoleName;
use uniarm_trainer::network::DeviceName;

use crate::{
    args::{BaseArgs, COUNT_MAX, EngineArgs, ProcessArgs, RewardArgs},
    bounds, catalogue,
    device::{DeviceArgs, Model},
    process::Process,
    served::Served,
    tls::role_name,
    worker,
};

/// Seconds that a group waits for a rank. The longest pass over a layer is far shorter; a process that hangs for so long is
/// taken for lost.
const TIMEOUT_SECONDS: f32 = 10.0;
const TIMEOUT_SECONDS_MAX: f32 = 3600.0;

/// Between two tries to form a group.
const RETRY_WAIT: Duration = Duration::from_millis(100);

/// A leader that does not answer a call within this is gone, and so is its record soon.
const PROBE_WAIT: Duration = Duration::from_secs(1);

const NAME_BYTES_MAX: usize = 64;

/// Several processes share the weights of one model.
#[derive(Debug, Clone, Args)]
pub struct GroupArgs {
    /// Name of the processes that hold one model together, each its part; all have the same model and cache flags
    #[arg(long, env = "UNIARM_GROUP", value_name = "NAME")]
    pub group: Option<String>,
    /// Which of them this is, from 0; rank 0 is the worker that others see
    #[arg(long, env = "UNIARM_RANK", value_parser = bounds::within(0..=COUNT_MAX))]
    pub rank: Option<usize>,
    /// How many they are
    #[arg(long, env = "UNIARM_SIZE", value_parser = bounds::within(0..=COUNT_MAX))]
    pub size: Option<usize>,
    /// Ranges of layers that they cut the model into, each on as many ranks: for machines with slow links between them
    #[arg(long, env = "UNIARM_STAGES", default_value_t = 1, value_parser = bounds::within(0..=COUNT_MAX))]
    pub stages: usize,
    /// Where they meet: rank 0 listens there, the others call it (host:port) [default: they find it in the store]
    #[arg(long, env = "UNIARM_GROUP_ADDRESS", value_name = "ADDRESS")]
    pub group_address: Option<String>,
    /// Seconds after which a rank that does not answer is lost, and so is the other end of a lane of rows (--dense-over nccl)
    #[arg(long, env = "UNIARM_GROUP_TIMEOUT", default_value_t = TIMEOUT_SECONDS)]
    pub group_timeout: f32,
}

/// One rank of a group.
#[derive(Clone)]
pub struct Seat {
    group: String,
    rank: usize,
    size: usize,
    stages: usize,
    address: Option<String>,
    timeout: Duration,
    wires: Arc<dyn Wires>,
    device: DeviceArgs,
}

/// Where a group meets.
struct Meeting {
    address: String,
    epoch: u64,
}

/// Rank 0's model, and the word that its group is over.
struct Led {
    model: Box<Leader>,
    lost: oneshot::Receiver<String>,
}

// === impl GroupArgs ===

impl GroupArgs {
    /// How long a rank, and the other end of a lane of rows, is waited for.
    ///
    /// # Errors
    /// For what is no such time; the sentence names the flag.
    pub fn timeout(&self) -> anyhow::Result<Duration> {
        if !(self.group_timeout > 0.0 && self.group_timeout <= TIMEOUT_SECONDS_MAX) {
            bail!("--group-timeout wants up to {TIMEOUT_SECONDS_MAX} seconds, not {}", self.group_timeout);
        }
        Ok(Duration::from_secs_f32(self.group_timeout))
    }

    /// The seat that the flags name; none without `--group`.
    ///
    /// # Errors
    /// For flags that name none; the sentence names the flag.
    pub fn seat(
        &self,
        role: Role,
        process: &ProcessArgs,
        device: DeviceArgs,
    ) -> anyhow::Result<Option<Seat>> {
        let Some(group) = &self.group else {
            if self.rank.is_some() || self.size.is_some() || self.stages != 1 || self.group_address.is_some()
            {
                bail!("--rank, --size, --stages and --group-address go with --group");
            }
            return Ok(None);
        };
        if group.is_empty() || group.len() > NAME_BYTES_MAX {
            bail!("--group wants a name of 1..={NAME_BYTES_MAX} bytes, not {}", group.len());
        }
        let (Some(rank), Some(size)) = (self.rank, self.size) else {
            bail!("--group wants --rank and --size")
        };
        if !(1..=RANKS_MAX).contains(&size) {
            bail!("--size {size} is not in 1..={RANKS_MAX}");
        }
        if rank >= size {
            bail!("--rank {rank} is not in 0..{size}, the ranks of --size {size}");
        }
        if self.stages == 0 || !size.is_multiple_of(self.stages) {
            bail!("--stages {} does not divide the {size} ranks of --size", self.stages);
        }
        let timeout = self.timeout()?;
        if self.group_address.is_none() && process.store.parse()? == StoreAddress::Memory {
            bail!("a group with --store memory needs --group-address, or give it etcd://…");
        }
        if let Some(address) = &self.group_address {
            let resolved = address.to_socket_addrs().with_context(|| format!("--group-address {address}"));
            // Others may come to be later; where this rank listens is known.
            if rank == 0 {
                resolved?;
            }
        }
        Ok(Some(Seat {
            group: group.clone(),
            rank,
            size,
            stages: self.stages,
            address: self.group_address.clone(),
            timeout,
            wires: process.tls.wires(role_name(role))?,
            device,
        }))
    }
}

// === roles ===

/// A rank of a base worker.
pub async fn base(mut process: Process, seat: Seat, args: BaseArgs) -> anyhow::Result<()> {
    let Some((files, shard)) = seat.load(&process, args.model.clone(), &args.engine).await? else {
        return Ok(());
    };
    if seat.rank > 0 {
        drop(files);
        return seat.follow(process, shard, Vec::new()).await;
    }
    let Some(Led { model, lost }) = seat.lead(&process, shard, &args.process.listen).await? else {
        return Ok(());
    };
    process.lost = Some(lost);
    let flags = (&args.engine, &args.exchange);
    let grpc = GrpcScorer { dialer: args.process.tls.dialer(&[RoleName::Reward])?, lanes: None };
    let scorer = Arc::new(StoreScorer::new(grpc, process.store.watch()));
    let (handle, member) = worker::start_base(files, model, args.name, flags, scorer, &process.metrics)?;
    let Some(member) = process.member(seat.sign(member)).await? else { return Ok(()) };
    process.serve(member, Served::Base(handle), None).await
}

/// A rank of a reward worker.
pub async fn reward(mut process: Process, seat: Seat, args: RewardArgs) -> anyhow::Result<()> {
    let Some((files, shard)) = seat.load(&process, args.model.clone(), &args.engine).await? else {
        return Ok(());
    };
    if seat.rank > 0 {
        let adapters: anyhow::Result<Vec<Arc<Adapter>>> = args
            .models
            .adapter
            .iter()
            .map(|flag| {
                let (_, folder) = worker::adapter_name(flag)?;
                Ok(Arc::new(Adapter::load(&folder, &files.config, &files.fingerprint)?))
            })
            .collect();
        drop(files);
        return seat.follow(process, shard, adapters?).await;
    }
    let Some(Led { model, lost }) = seat.lead(&process, shard, &args.process.listen).await? else {
        return Ok(());
    };
    process.lost = Some(lost);
    let config = files.config.clone();
    let model = Model::without_lanes(files, model);
    let (handle, member) = worker::start_reward(model, &args.models, &args.engine, &process.metrics)?;
    let Some(member) = process.member(seat.sign(member)).await? else { return Ok(()) };
    let follower = AdapterFollower::new(handle.clone(), config, &process.metrics).sharing();
    let Some(member) = catalogue::follow(&process, follower, &handle, member).await else { return Ok(()) };
    process.serve(member, Served::Reward(handle), None).await
}

// === impl Seat ===

impl Seat {
    /// This rank's part of a model. `None`: stopped meanwhile.
    async fn load(
        &self,
        process: &Process,
        source: String,
        engine: &EngineArgs,
    ) -> anyhow::Result<Option<(ModelFiles, Shard)>> {
        let options = worker::llama_options(engine, worker::Threads::of(false));
        let part = Part { rank: self.rank, size: self.size, stages: self.stages };
        let device = self.device;
        let loading = tokio::task::spawn_blocking(move || {
            let files = worker::open(&source)?;
            let shard = device.load_part(&files, &options, part).with_context(|| {
                let Part { rank, size, .. } = part;
                format!("cannot load rank {rank} of {size} of {source} on --device {}", device.device)
            })?;
            let shard = shard.ranked_by(uniarm_engine::likeliest::rank);
            anyhow::Ok((files, shard))
        });
        tokio::select! {
            loaded = loading => {
                let (files, shard) = loaded.context("loading the model panicked")??;
                let Part { rank, size, stages } = part;
                let (weights, block) = (shard.weight_bytes(), shard.block_bytes());
                tracing::info!(group = self.group, rank, size, stages, weights, block, "holds its part of the model");
                Ok(Some((files, shard)))
            }
            () = process.shutdown.begun() => Ok(None),
        }
    }

    /// What the store says of the worker.
    fn sign(&self, member: Member) -> Member {
        Member { group: self.group.clone(), rank: self.rank as u32, size: self.size as u32, ..member }
    }

    fn collective(&self, epoch: u64) -> Group {
        Group { size: self.size, epoch, payload: Payload::F32, timeout: self.timeout }
    }

    /// Rank 0: meets the others, however long that takes. `None`: stopped meanwhile.
    async fn lead(&self, process: &Process, shard: Shard, listen: &str) -> anyhow::Result<Option<Led>> {
        let host = |address: &str| address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned();
        let bound = self.address.clone().unwrap_or_else(|| format!("{}:0", host(listen)));
        let listener = TcpListener::bind(&bound).with_context(|| format!("cannot listen at {bound}"))?;
        let port = listener.local_addr().context("the group's own address")?.port();
        // Without an address in the flags the others find one in the store, and its generation is the group's epoch.
        let published = match &self.address {
            Some(_) => None,
            None => {
                let address = format!("{}:{port}", host(&process.advertise));
                tokio::select! {
                    published = self.publish(process, address) => Some(published?),
                    () = process.shutdown.begun() => return Ok(None),
                }
            }
        };
        let epoch = published.as_ref().map_or(0, |registration| registration.generation().0);
        let seat = self.clone();
        let (say, lost) = oneshot::channel();
        let meeting = tokio::task::spawn_blocking(move || seat.meet(shard, &listener, epoch));
        let shard = tokio::select! {
            met = meeting => met.context("meeting the other ranks panicked")??,
            () = process.shutdown.begun() => return Ok(None),
        };
        if let Some(registration) = published {
            registration.leave().await;
        }
        let mut model = Box::new(shard.lead(move |error| {
            // Nobody listens in a process that ends anyway.
            let _ = say.send(error.to_string());
        }));
        worker::self_test(&mut *model).context("the model fails its self-test")?;
        tracing::info!(group = self.group, size = self.size, epoch, "the group is complete");
        Ok(Some(Led { model, lost }))
    }

    /// Takes the others in, until all are there.
    fn meet(&self, mut shard: Shard, listener: &TcpListener, epoch: u64) -> anyhow::Result<Shard> {
        loop {
            let met =
                Tcp::lead_over(&*self.wires, listener, self.collective(epoch)).map_err(ModelError::from);
            match met.and_then(|met| self.join(&mut shard, met)) {
                Ok(()) => return Ok(shard),
                Err(ModelError::Group(error)) => tracing::warn!(%error, "the group is not complete yet"),
                Err(other) => return Err(other.into()),
            }
        }
    }

    /// Writes into the store where the group meets; under an id of this generation, so that nobody waits for the end of a
    /// former leader's lease.
    async fn publish(
        &self,
        process: &Process,
        address: String,
    ) -> anyhow::Result<uniarm_cluster::Registration> {
        let generation = process.store.next_generation(&MemberId(self.group.clone())).await?;
        let member =
            Member { id: self.meeting_id(generation), generation, address, ..Member::new(process.role) };
        Ok(process.store.register(self.sign(member)).await?)
    }

    fn meeting_id(&self, generation: Generation) -> MemberId {
        MemberId(format!("{}.{}", self.group, generation.0))
    }

    /// Any other rank: follows one leader after the other, until this process is stopped.
    async fn follow(
        &self,
        process: Process,
        mut shard: Shard,
        adapters: Vec<Arc<Adapter>>,
    ) -> anyhow::Result<()> {
        let Process { store, readiness, shutdown, role, server, .. } = process;
        // Nobody calls a rank that follows.
        drop(server);
        let adapters: Arc<[Arc<Adapter>]> = adapters.into();
        loop {
            let meeting = tokio::select! {
                meeting = self.find(&*store) => meeting,
                () = shutdown.begun() => return Ok(()),
            };
            let (seat, adapters, readiness, role) = (self.clone(), adapters.clone(), readiness.clone(), role);
            let following = tokio::task::spawn_blocking(move || {
                let ended = match seat.enter(&mut shard, &meeting) {
                    Ok(()) => {
                        readiness.set_ready();
                        println!("uniarm {role} rank {} of {} is ready", seat.rank, seat.size);
                        shard.follow(&adapters)
                    }
                    Err(error) => error,
                };
                readiness.set_not_ready("its group is not complete");
                (shard, ended)
            });
            let ended = tokio::select! {
                followed = following => {
                    let ended;
                    (shard, ended) = followed.context("a step panicked")?;
                    ended
                }
                () = shutdown.begun() => return Ok(()),
            };
            match ended {
                ModelError::Group(error) => tracing::warn!(%error, "waiting for the next group"),
                other => return Err(other.into()),
            }
            tokio::time::sleep(RETRY_WAIT).await;
        }
    }

    fn enter(&self, shard: &mut Shard, meeting: &Meeting) -> Result<(), ModelError> {
        let group = self.collective(meeting.epoch);
        let met = Tcp::connect_over(&*self.wires, &meeting.address, self.rank, group)?;
        self.join(shard, met)
    }

    /// Joins those whom it has met: between GPUs by NCCL, once all agree that they have one.
    fn join(&self, shard: &mut Shard, mut met: Tcp) -> Result<(), ModelError> {
        let group: Box<dyn Collective> = match self.device.device {
            DeviceName::Cpu => Box::new(met),
            DeviceName::Cuda(device) => {
                shard.agree(&mut met)?;
                Box::new(Nccl::over(met, device)?)
            }
        };
        shard.join(group)
    }

    /// Where somebody leads this group now.
    async fn find(&self, store: &dyn MemberStore) -> Meeting {
        if let Some(address) = &self.address {
            return Meeting { address: address.clone(), epoch: 0 };
        }
        let mut members = store.watch();
        loop {
            let snapshot = members.borrow_and_update().clone();
            let of_group = |member: &&Arc<Member>| {
                member.group == self.group && member.id == self.meeting_id(member.generation)
            };
            let latest = snapshot.members().iter().filter(of_group).max_by_key(|member| member.generation.0);
            if let Some(member) = latest {
                let address = member.address.clone();
                let answers = tokio::task::spawn_blocking({
                    let address = address.clone();
                    move || answers(&address)
                });
                if answers.await.unwrap_or(false) {
                    return Meeting { address, epoch: member.generation.0 };
                }
            }
            // A change, or a leader that comes back to its address.
            let _ = tokio::time::timeout(RETRY_WAIT, members.changed()).await;
        }
    }
}

/// Returns what is said; never, where nobody could.
pub async fn said(lost: &mut Option<oneshot::Receiver<String>>) -> String {
    if let Some(lost) = lost
        && let Ok(why) = lost.await
    {
        return why;
    }
    std::future::pending().await
}

/// Whether anybody listens there: the record of a leader that was killed stays until its lease ends.
fn answers(address: &str) -> bool {
    let addresses = address.to_socket_addrs().into_iter().flatten();
    let reaches = |address: SocketAddr| TcpStream::connect_timeout(&address, PROBE_WAIT).is_ok();
    addresses.into_iter().any(reaches)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use uniarm_proto::Role;

    use crate::args::{Cli, Command};

    fn seat(flags: &[&str]) -> Result<Option<(usize, usize)>, String> {
        let all = [&["uniarm", "base", "--model", "m"], flags].concat();
        let Command::Base(args) = Cli::try_parse_from(all).expect("flags of their types").command else {
            panic!("another command")
        };
        let seat =
            args.group.seat(Role::Base, &args.process, args.device).map_err(|error| format!("{error:#}"))?;
        Ok(seat.map(|seat| (seat.rank, seat.size)))
    }

    #[test]
    fn flags_that_name_no_seat_are_refused_by_name() {
        let address = ["--group-address", "127.0.0.1:7100"];
        assert_eq!(seat(&[]), Ok(None));
        let of = |group: &[&str]| seat(&[group, &address].concat());
        assert_eq!(of(&["--group", "g0", "--rank", "1", "--size", "2"]), Ok(Some((1, 2))));
        let staged = ["--group", "g0", "--rank", "3", "--size", "4", "--stages", "2", "--device", "cuda:1"];
        assert_eq!(of(&staged), Ok(Some((3, 4))));
        let refused = [
            (of(&["--group", "g0"]), "--group wants --rank and --size"),
            (of(&["--rank", "0"]), "go with --group"),
            (of(&["--group", "", "--rank", "0", "--size", "1"]), "--group wants a name"),
            (of(&["--group", "g0", "--rank", "2", "--size", "2"]), "--rank 2 is not in 0..2"),
            (of(&["--group", "g0", "--rank", "0", "--size", "0"]), "--size 0 is not in 1..=64"),
            (of(&["--group", "g0", "--rank", "0", "--size", "65"]), "--size 65 is not in 1..=64"),
            (of(&["--group", "g0", "--rank", "0", "--size", "2", "--group-timeout", "0"]), "--group-timeout"),
            (
                of(&["--group", "g0", "--rank", "0", "--size", "2", "--group-timeout", "NaN"]),
                "--group-timeout",
            ),
            (
                of(&["--group", "g0", "--rank", "0", "--size", "4", "--stages", "3"]),
                "--stages 3 does not divide",
            ),
            (
                of(&["--group", "g0", "--rank", "0", "--size", "4", "--stages", "0"]),
                "--stages 0 does not divide",
            ),
            (of(&["--stages", "2"]), "go with --group"),
            (seat(&["--group", "g0", "--rank", "0", "--size", "2"]), "needs --group-address"),
            (
                seat(&["--group", "g0", "--rank", "0", "--size", "2", "--group-address", "nowhere"]),
                "--group-address nowhere",
            ),
        ];
        for (refused, sentence) in refused {
            let said = refused.expect_err(sentence);
            assert!(said.contains(sentence), "{said:?} does not say {sentence:?}");
        }
    }
}
