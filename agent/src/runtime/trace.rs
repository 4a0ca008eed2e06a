//! Tracers: who wants to see decisions, and what each gets.
//!
//! ```text
//!  Datapath (TRACE) --.                       .--> lines of one operator
//!                      >-- task: filter, rate <
//!  gates (Replays) ---'                       '--> lines of another
//! ```
//!
//! The first tracer has the traced programs attached, the last one takes them away. All tracers share
//! one filter in the kernel, which tells what any of them wants; here each gets what it asked for. A
//! tracer whose lines are not read loses lines, and keeps nobody waiting.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::trace::{Budget, Decision, Filter, Program, Record};
use futures::future::{self, FutureExt as _};
use time::OffsetDateTime;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::time::{Instant, sleep_until};

use crate::clock::now;
use crate::control::Reply;
use crate::control::trace::{TraceLine, TraceRequest, TraceRow};
use crate::datapath::trace::TraceRecords;
use crate::datapath::{Datapath, DatapathError};

/// Replays that wait to be told; more are left out.
const REPLAYS: usize = 1024;
/// Pause before the usual programs are attached again after that has failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Handle of the task. When it is dropped, the usual programs are attached again.
pub struct Tracing {
    datapath: Datapath,
    tracers: UnboundedSender<Tracer>,
    replays: Replays,
}

impl Tracing {
    /// Starts the task. Must be called within a tokio runtime.
    pub fn start(datapath: &Datapath) -> Self {
        let (tracers, joining) = mpsc::unbounded_channel();
        let (replays, replayed) = Replays::new();
        let hub = Hub {
            datapath: datapath.clone(),
            tracers: Vec::new(),
            records: None,
            replays: replays.clone(),
            left_out: 0,
            ports: BTreeMap::new(),
            retry: None,
        };
        tokio::spawn(hub.run(joining, replayed));
        Self {
            datapath: datapath.clone(),
            tracers,
            replays,
        }
    }

    /// Tells decisions to an operator from now on, or says why not.
    pub fn add(
        &self,
        request: TraceRequest,
        replies: UnboundedSender<Reply>,
        lines: Option<mpsc::Sender<TraceLine>>,
    ) {
        let Some(lines) = lines else {
            return;
        };
        match filter(&self.datapath, &request) {
            Ok(filter) => {
                let tracer = Tracer {
                    filter,
                    budget: Budget::default(),
                    replies,
                    lines,
                };
                // Fails when the agent ends.
                let _ = self.tracers.send(tracer);
            }
            Err(reason) => drop(replies.send(Reply::Error(reason))),
        }
    }

    /// For who replays held frames.
    pub fn replays(&self) -> Replays {
        self.replays.clone()
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        if let Err(error) = self.datapath.trace_stop() {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "Traced programs stay attached until the next agent starts"
            );
        }
    }
}

/// The filter that an operator asks for, or a sentence that says what is wrong.
fn filter(datapath: &Datapath, request: &TraceRequest) -> Result<Filter, String> {
    let mut filter = Filter::everything(request.rate);
    if !request.programs.is_empty() {
        filter.programs = 0;
        for name in &request.programs {
            let program = Program::from_name(name).ok_or_else(|| {
                format!("There is no program {name:?}; see roamcast trace --help")
            })?;
            filter.programs |= program.bit();
        }
    }
    if let Some(port) = &request.port {
        filter.ifindex = datapath
            .attachments()
            .into_iter()
            .find(|attachment| attachment.interface == *port)
            .map(|attachment| attachment.ifindex)
            .ok_or_else(|| {
                format!("No program is attached to {port:?}; roamcast status shows the ports")
            })?;
    }
    if let Some(address) = request.address {
        filter.address = address.octets();
    }
    Ok(filter)
}

/// Where replays are told. Costs one load of a flag while nobody traces.
#[derive(Clone)]
pub struct Replays {
    is_on: Arc<AtomicBool>,
    left_out: Arc<AtomicU64>,
    sender: mpsc::Sender<Record>,
}

impl Replays {
    /// Nobody traces.
    pub fn untraced() -> Self {
        Self::new().0
    }

    fn new() -> (Self, mpsc::Receiver<Record>) {
        let (sender, receiver) = mpsc::channel(REPLAYS);
        let replays = Self {
            is_on: Arc::default(),
            left_out: Arc::default(),
            sender,
        };
        (replays, receiver)
    }

    /// Tells what the agent does with a held frame. Never waits.
    pub(super) fn tell(&self, ifindex: u32, decision: Decision, number: u64, frame: &[u8]) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let record = Record::by_agent(now().0, ifindex, decision, number, frame);
        if self.sender.try_send(record).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One operator.
struct Tracer {
    filter: Filter,
    budget: Budget,
    replies: UnboundedSender<Reply>,
    lines: mpsc::Sender<TraceLine>,
}

impl Tracer {
    /// Tells a decision, if it is wanted and within the rate.
    fn tell(&mut self, record: &Record, at_ns: u64, line: impl FnOnce() -> Option<TraceLine>) {
        if !self.filter.matches(record) || !self.budget.take(at_ns, &self.filter) {
            return;
        }
        if let Some(line) = line()
            && (!self.tell_left_out() || self.lines.try_send(line).is_err())
        {
            self.budget.left_out += 1;
        }
    }

    /// Tells how many lines were left out, if any; `false` if there is no room for that.
    fn tell_left_out(&mut self) -> bool {
        let left_out = self.budget.left_out;
        if left_out == 0 {
            return true;
        }
        let told = self.lines.try_send(TraceLine::LeftOut { left_out }).is_ok();
        if told {
            self.budget.left_out = 0;
        }
        told
    }
}

/// What the task owns.
struct Hub {
    datapath: Datapath,
    tracers: Vec<Tracer>,
    /// While the traced programs are attached.
    records: Option<TraceRecords>,
    replays: Replays,
    /// What the programs had left out when that was last looked at.
    left_out: u64,
    ports: BTreeMap<u32, String>,
    /// When the usual programs are to be attached once more.
    retry: Option<Instant>,
}

enum Event {
    Joined(Tracer),
    Record(Record),
    Look,
    Left,
    Broken(DatapathError),
    Retry,
    End,
}

impl Hub {
    async fn run(
        mut self,
        mut joining: UnboundedReceiver<Tracer>,
        mut replayed: mpsc::Receiver<Record>,
    ) {
        loop {
            match self.next(&mut joining, &mut replayed).await {
                Event::Joined(tracer) => self.join(tracer).await,
                Event::Record(record) => self.tell(&record),
                Event::Look => self.look(),
                Event::Left => {
                    self.tracers.retain(|tracer| !tracer.lines.is_closed());
                    self.refilter().await;
                }
                Event::Broken(error) => {
                    for tracer in self.tracers.drain(..) {
                        let _ = tracer.replies.send(Reply::Error(error.to_string()));
                    }
                    self.stop().await;
                }
                Event::Retry => self.stop().await,
                Event::End => return,
            }
        }
    }

    async fn next(
        &mut self,
        joining: &mut UnboundedReceiver<Tracer>,
        replayed: &mut mpsc::Receiver<Record>,
    ) -> Event {
        let records = async {
            match &mut self.records {
                Some(records) => records.next().await,
                None => future::pending().await,
            }
        };
        let left = async {
            if self.tracers.is_empty() {
                future::pending::<()>().await;
            }
            let closed = self.tracers.iter().map(|it| it.lines.closed().boxed());
            future::select_all(closed).await;
        };
        let retry = async {
            match self.retry {
                Some(at) => sleep_until(at).await,
                None => future::pending().await,
            }
        };
        tokio::select! {
            tracer = joining.recv() => tracer.map_or(Event::End, Event::Joined),
            record = records => match record {
                Ok(Some(record)) => Event::Record(record),
                Ok(None) => Event::Look,
                Err(error) => Event::Broken(error),
            },
            Some(record) = replayed.recv() => Event::Record(record),
            () = left => Event::Left,
            () = retry => Event::Retry,
        }
    }

    /// Takes a tracer in, and has the traced programs attached for the first one.
    async fn join(&mut self, tracer: Tracer) {
        let filter = self
            .tracers
            .iter()
            .fold(tracer.filter, |union, it| union.union(&it.filter));
        let started = if self.records.is_some() {
            self.datapath.trace_filter(&filter)
        } else {
            self.start(filter).await
        };
        match started {
            Ok(()) => {
                let _ = tracer.replies.send(Reply::Tracing);
                self.tracers.push(tracer);
            }
            Err(error) => drop(tracer.replies.send(Reply::Error(error.to_string()))),
        }
    }

    async fn start(&mut self, filter: Filter) -> Result<(), DatapathError> {
        // Those of an earlier trace that could not be taken away.
        self.datapath.off_runtime(Datapath::trace_stop).await?;
        self.retry = None;
        let ring = self
            .datapath
            .off_runtime(move |datapath| datapath.trace_start(&filter))
            .await?;
        self.records = Some(ring.records()?);
        self.left_out = 0;
        self.replays.left_out.store(0, Ordering::Relaxed);
        self.replays.is_on.store(true, Ordering::Relaxed);
        tracing::info!("Traced programs attached");
        Ok(())
    }

    /// Has the kernel tell what the tracers want who are left.
    async fn refilter(&mut self) {
        let filters = self.tracers.iter().map(|tracer| tracer.filter);
        match filters.reduce(|union, filter| union.union(&filter)) {
            Some(filter) => {
                if let Err(error) = self.datapath.trace_filter(&filter) {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "More decisions are told than anybody wants to see"
                    );
                }
            }
            None => self.stop().await,
        }
    }

    async fn stop(&mut self) {
        self.replays.is_on.store(false, Ordering::Relaxed);
        self.records = None;
        self.retry = None;
        match self.datapath.off_runtime(Datapath::trace_stop).await {
            Ok(()) => tracing::info!("Traced programs taken away"),
            Err(error) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "Traced programs stay attached; trying again"
                );
                // They have nothing to tell meanwhile.
                let _ = self.datapath.trace_filter(&Filter::NOTHING);
                self.retry = Some(Instant::now() + RETRY_INTERVAL);
            }
        }
    }

    fn tell(&mut self, record: &Record) {
        let port = self.port(record.ifindex);
        let at_ns = now().0;
        for tracer in &mut self.tracers {
            tracer.tell(record, at_ns, || {
                let age = Duration::from_nanos(at_ns.saturating_sub(record.at_ns));
                let at = OffsetDateTime::now_utc() - age;
                let row = TraceRow::new(record, port.clone(), at)?;
                Some(TraceLine::Decision(Box::new(row)))
            });
        }
    }

    /// Name of a port; a number when it has none any more.
    fn port(&mut self, ifindex: u32) -> String {
        if let Some(name) = self.ports.get(&ifindex) {
            return name.clone();
        }
        let attachments = self.datapath.attachments().into_iter();
        self.ports = attachments.map(|it| (it.ifindex, it.interface)).collect();
        let name = self.ports.get(&ifindex).cloned();
        name.unwrap_or_else(|| ifindex.to_string())
    }

    /// Tells what was left out.
    fn look(&mut self) {
        let programs = match self.datapath.trace_left_out() {
            Ok(programs) => programs,
            Err(error) => {
                tracing::debug!(%error, "Cannot read what was left out");
                return;
            }
        };
        let replays = self.replays.left_out.swap(0, Ordering::Relaxed);
        let left_out = programs.saturating_sub(self.left_out) + replays;
        self.left_out = programs;
        // Ports may have got other names.
        self.ports.clear();
        for tracer in &mut self.tracers {
            tracer.budget.left_out += left_out;
            tracer.tell_left_out();
        }
    }
}
