//! Tracers of `roamcast trace`: filters and rate limits, one tracer for each operator.
//!
//! ```text
//!  Datapath (TRACE) --.                       .--> lines of one operator
//!                      >-- task: filter, rate <
//!  gates (Replays) ---'                       '--> lines of another
//! ```
//!
//! The first tracer attaches the traced variants of the programs; the last one detaches them. All
//! tracers share one filter in the kernel, the union of their filters; the task then applies each
//! tracer's own filter. A tracer whose operator reads too slowly loses lines and delays nobody.

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

/// Records of replayed frames that may wait for the task; further ones are dropped and counted.
const REPLAYS: usize = 1024;
/// Pause before the next attempt to attach the usual programs.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Handle of the task. Dropping the handle attaches the usual programs again.
pub struct Tracing {
    datapath: Datapath,
    tracers: UnboundedSender<Tracer>,
    replays: Replays,
}

impl Tracing {
    /// Starts the task. The caller must be within a tokio runtime.
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

    /// Adds an operator's tracer, or replies with the reason of a refusal.
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
                // The send fails if the agent is ending.
                let _ = self.tracers.send(tracer);
            }
            Err(reason) => drop(replies.send(Reply::Error(reason))),
        }
    }

    /// Returns the handle through which the gates report replayed frames.
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

/// Converts an operator's request to a filter. The error is a sentence about the request.
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

/// Reports replayed frames to the task. Without a tracer a report costs one load of a flag.
#[derive(Clone)]
pub struct Replays {
    is_on: Arc<AtomicBool>,
    left_out: Arc<AtomicU64>,
    sender: mpsc::Sender<Record>,
}

impl Replays {
    /// Returns a handle without a task; reports go nowhere.
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

    /// Reports the agent's decision about a held frame. Never blocks.
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

/// Filter, budget and channel of one operator.
struct Tracer {
    filter: Filter,
    budget: Budget,
    replies: UnboundedSender<Reply>,
    lines: mpsc::Sender<TraceLine>,
}

impl Tracer {
    /// Sends a decision to the operator if it passes the filter and the rate limit.
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

    /// Sends the number of omitted lines, if any. Returns `false` if the channel is full.
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

/// State of the task.
struct Hub {
    datapath: Datapath,
    tracers: Vec<Tracer>,
    /// Records of the traced programs; `None` while the usual programs are attached.
    records: Option<TraceRecords>,
    replays: Replays,
    /// Last reading of the programs' own counter of omitted records.
    left_out: u64,
    ports: BTreeMap<u32, String>,
    /// When to try again to attach the usual programs.
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

    /// Adds a tracer; attaches the traced programs for the first one.
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
        // An earlier trace may have failed to detach its programs.
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

    /// Sets the kernel's filter to the union of the remaining tracers' filters.
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
                // The programs then report nothing until the retry.
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

    /// Returns the name of a port, or its number if the port is gone.
    fn port(&mut self, ifindex: u32) -> String {
        if let Some(name) = self.ports.get(&ifindex) {
            return name.clone();
        }
        let attachments = self.datapath.attachments().into_iter();
        self.ports = attachments.map(|it| (it.ifindex, it.interface)).collect();
        let name = self.ports.get(&ifindex).cloned();
        name.unwrap_or_else(|| ifindex.to_string())
    }

    /// Passes the number of omitted records to the tracers.
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
        // Ports may have new names.
        self.ports.clear();
        for tracer in &mut self.tracers {
            tracer.budget.left_out += left_out;
            tracer.tell_left_out();
        }
    }
}
