//! Client of the signalling, sans-IO: without clock and sockets.
//!
//! The messages are those of [`common::signal`]. Datagrams may be lost, duplicated and reordered,
//! so the client repeats every request until its answer, and counts an answer once.
//!
//! ```text
//! Searching --AgentSearchReply--> Found --request()--> Requesting --MigrationResponse--> Prepared
//!                                                                                            |
//!                           Over <--Completed or MigrationAbort-- Waiting <-----ready()------+
//! ```
//!
//! The caller passes inputs to [`Client::handle_datagram`] and [`Client::handle_timeout`], then
//! drains [`Client::poll_transmit`] and [`Client::poll_event`], and sleeps until
//! [`Client::poll_timeout`]. Times count from an arbitrary fixed moment on the VM's own clock. That
//! clock stops while the VM is paused, so a migration lets no deadline expire early.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod types;

use std::collections::VecDeque;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::backoff::Repeat;
use common::signal::{
    AgentSearch, Code, DecodeError, MAX_TEXT_BYTES, MigrationAbort, MigrationProgress,
    MigrationReady, MigrationRequest, Phase, Reason, VmMessage,
};
use common::text::Escaped;

pub(crate) use types::{Agent, ClientError, Event, Timing, Transmit};

/// All-nodes multicast address of the link (RFC 4291 §2.7.1).
pub(crate) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Interval and deadline of a repeated request.
#[derive(Debug)]
struct Retry {
    repeat: Repeat,
    deadline: Duration,
}

#[derive(Debug)]
enum State {
    Searching {
        retry: Retry,
        /// Best answer so far, its rank, and the time to accept it.
        answer: Option<(usize, Agent, Duration)>,
    },
    Found,
    Requesting {
        retry: Retry,
        request: MigrationRequest,
    },
    Prepared,
    Waiting {
        ready: MigrationReady,
        next: Duration,
        deadline: Duration,
        phase: Phase,
        /// The VM has arrived; the source agent may still report the length of the pause.
        arrived: Option<MigrationProgress>,
    },
    Over,
}

/// The client of one migration.
#[derive(Debug)]
pub(crate) struct Client {
    timing: Timing,
    /// NICs to search on, most likely first.
    interfaces: Vec<u32>,
    search: u64,
    transaction: u64,
    agent: Option<Agent>,
    state: State,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Client {
    /// Starts the search on `interfaces`, most likely first. The transactions of search and
    /// migration must differ, and must be new for each client.
    pub(crate) fn new(
        now: Duration,
        timing: Timing,
        interfaces: Vec<u32>,
        (search, transaction): (u64, u64),
    ) -> Self {
        let retry = Retry {
            repeat: Repeat::new(now, timing.retry_first),
            deadline: now + timing.search,
        };
        let mut client = Self {
            timing,
            interfaces,
            search,
            transaction,
            agent: None,
            state: State::Searching {
                retry,
                answer: None,
            },
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        };
        client.handle_timeout(now);
        client
    }

    /// Requests the migration, after [`Event::Found`].
    pub(crate) fn request(&mut self, now: Duration, destination: String, domain: Option<String>) {
        if !matches!(self.state, State::Found) {
            return;
        }
        self.state = State::Requesting {
            retry: Retry {
                repeat: Repeat::new(now, self.timing.retry_first),
                deadline: now + self.timing.request_silence,
            },
            request: MigrationRequest {
                destination,
                domain,
            },
        };
        self.handle_timeout(now);
    }

    /// Reports that the idle NIC is configured, after [`Event::Prepared`].
    pub(crate) fn ready(&mut self, now: Duration, ready: MigrationReady) {
        if !matches!(self.state, State::Prepared) {
            return;
        }
        self.state = State::Waiting {
            ready,
            next: now,
            deadline: now + self.timing.ready_silence,
            phase: Phase::Preparing,
            arrived: None,
        };
        self.handle_timeout(now);
    }

    /// Replaces the message of [`Client::ready`]; [`Client::handle_timeout`] becomes due.
    pub(crate) fn say_ready(&mut self, now: Duration, said: MigrationReady) {
        if let State::Waiting { ready, next, .. } = &mut self.state {
            *ready = said;
            *next = now;
        }
    }

    /// Ends the migration, and tells the agent when it may be working for this VM.
    pub(crate) fn abort(&mut self, code: Code, reason: &str) {
        if !matches!(
            self.state,
            State::Searching { .. }
                | State::Found
                | State::Waiting {
                    arrived: Some(_),
                    ..
                }
                | State::Over
        ) {
            let reason = Escaped(reason).to_string();
            let end = reason.floor_char_boundary(MAX_TEXT_BYTES);
            let reason = Reason::new(code, reason.get(..end).unwrap_or_default());
            self.send(ALL_NODES, &MigrationAbort(reason).into());
        }
        self.state = State::Over;
    }

    /// Handles a datagram from port [`common::signal::PORT`] of `from`.
    pub(crate) fn handle_datagram(
        &mut self,
        now: Duration,
        ifindex: u32,
        from: Ipv6Addr,
        bytes: &[u8],
    ) {
        let searching = matches!(self.state, State::Searching { .. });
        let expected = if searching {
            self.search
        } else {
            self.transaction
        };
        let (transaction, message) = match VmMessage::decode(bytes) {
            Ok(decoded) => decoded,
            Err(DecodeError::Version {
                theirs,
                transaction,
            }) if transaction == expected => {
                return self.fail(ClientError::Version { theirs });
            }
            Err(error @ DecodeError::Text { transaction }) if transaction == expected => {
                return self.fail(ClientError::Text(error));
            }
            Err(_) => return,
        };
        if transaction != expected {
            return;
        }
        match message {
            VmMessage::AgentSearchReply(reply) => {
                let agent = Agent {
                    name: reply.agent,
                    address: from,
                    ifindex,
                    domain: reply.domain,
                    destinations: reply.destinations,
                };
                self.handle_answer(now, agent);
            }
            VmMessage::MigrationResponse(response) => {
                if matches!(self.state, State::Requesting { .. }) && self.is_agent(from) {
                    self.state = State::Prepared;
                    self.events.push_back(Event::Prepared(response));
                }
            }
            VmMessage::MigrationProgress(progress) => self.handle_progress(now, from, progress),
            VmMessage::MigrationAbort(abort) => {
                // During preparation only the client's agent may abort; later both agents may.
                let counts = match self.state {
                    State::Requesting { .. } => self.is_agent(from),
                    State::Waiting { ref arrived, .. } => arrived.is_none(),
                    State::Prepared | State::Searching { .. } => true,
                    State::Found | State::Over => false,
                };
                if counts {
                    self.fail(ClientError::Aborted(abort.0));
                }
            }
            VmMessage::AgentSearch(_)
            | VmMessage::MigrationRequest(_)
            | VmMessage::MigrationReady(_) => {}
        }
    }

    /// Sends due messages and ends overdue requests. Extra calls do nothing.
    pub(crate) fn handle_timeout(&mut self, now: Duration) {
        match &mut self.state {
            State::Searching { retry, answer } => {
                if let Some((_, agent, _)) = answer.take_if(|(_, _, settled)| now >= *settled) {
                    return self.found(agent);
                }
                if answer.is_none() && now >= retry.deadline {
                    let interfaces = String::new();
                    return self.fail(ClientError::NoAgent { interfaces });
                }
                if retry.repeat.is_due(now, self.timing.retry_most) {
                    let bytes = VmMessage::from(AgentSearch {}).encode(self.search);
                    for &ifindex in &self.interfaces {
                        self.transmits.push_back(Transmit {
                            ifindex,
                            to: ALL_NODES,
                            bytes: bytes.clone(),
                        });
                    }
                }
            }
            State::Requesting { retry, request } => {
                if now >= retry.deadline {
                    let silence = self.timing.request_silence;
                    let agent = self.agent.as_ref().map(|agent| agent.name.clone());
                    return self.fail(ClientError::Silent {
                        agent: agent.unwrap_or_default(),
                        silence,
                    });
                }
                if retry.repeat.is_due(now, self.timing.retry_most) {
                    let message = request.clone().into();
                    let to = self.agent.as_ref().map_or(ALL_NODES, |agent| agent.address);
                    self.send(to, &message);
                }
            }
            State::Waiting {
                ready,
                next,
                deadline,
                arrived,
                ..
            } => {
                if now >= *deadline {
                    if let Some(progress) = arrived.take() {
                        return self.completed(progress);
                    }
                    let silence = self.timing.ready_silence;
                    return self.fail(ClientError::Lost { silence });
                }
                if now >= *next {
                    *next = now + self.timing.ready_interval;
                    let message = ready.clone().into();
                    // To all nodes, because after the switch another agent answers.
                    self.send(ALL_NODES, &message);
                }
            }
            State::Found | State::Prepared | State::Over => {}
        }
    }

    /// When to call [`Client::handle_timeout`].
    pub(crate) fn poll_timeout(&self) -> Option<Duration> {
        match &self.state {
            State::Searching { retry, answer } => Some(match answer {
                Some((_, _, settled)) => retry.repeat.next.min(*settled),
                None => retry.repeat.next.min(retry.deadline),
            }),
            State::Requesting { retry, .. } => Some(retry.repeat.next.min(retry.deadline)),
            State::Waiting { next, deadline, .. } => Some(*next.min(deadline)),
            State::Found | State::Prepared | State::Over => None,
        }
    }

    /// Returns the next datagram to send.
    pub(crate) fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// Returns the next event.
    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Accepts an answer to the search. A VM may have all NICs on the agent's bridge, so every NIC
    /// may receive an answer; the most likely NIC wins when its answer arrives in time.
    fn handle_answer(&mut self, now: Duration, agent: Agent) {
        let Some(rank) = self.interfaces.iter().position(|&i| i == agent.ifindex) else {
            return;
        };
        let State::Searching { answer, .. } = &mut self.state else {
            return;
        };
        if rank == 0 {
            return self.found(agent);
        }
        match answer {
            Some((best, _, _)) if *best <= rank => {}
            Some((best, found, _)) => {
                *best = rank;
                *found = agent;
            }
            None => *answer = Some((rank, agent, now + self.timing.settle)),
        }
    }

    fn found(&mut self, agent: Agent) {
        self.state = State::Found;
        self.agent = Some(agent.clone());
        self.events.push_back(Event::Found(agent));
    }

    fn handle_progress(&mut self, now: Duration, from: Ipv6Addr, progress: MigrationProgress) {
        let is_agent = self.is_agent(from);
        match &mut self.state {
            State::Requesting { retry, .. } if is_agent => {
                // The agent has the request and is working on it.
                retry.deadline = now + self.timing.request_silence;
                self.events.push_back(Event::Progress(progress));
            }
            State::Waiting {
                arrived, deadline, ..
            } if progress.phase == Phase::Completed => {
                if progress.vm_pause_ms.is_some() {
                    self.completed(progress);
                } else if arrived.is_none() {
                    *arrived = Some(progress);
                    *deadline = now + self.timing.pause_known;
                }
            }
            State::Waiting {
                deadline,
                phase,
                arrived: None,
                ..
            } => {
                *deadline = now + self.timing.ready_silence;
                if progress.phase >= *phase {
                    *phase = progress.phase;
                    self.events.push_back(Event::Progress(progress));
                }
            }
            _ => {}
        }
    }

    fn completed(&mut self, progress: MigrationProgress) {
        self.state = State::Over;
        self.events.push_back(Event::Completed(progress));
    }

    fn is_agent(&self, from: Ipv6Addr) -> bool {
        self.agent
            .as_ref()
            .is_some_and(|agent| agent.address == from)
    }

    fn fail(&mut self, error: ClientError) {
        self.state = State::Over;
        self.events.push_back(Event::Failed(error));
    }

    fn send(&mut self, to: Ipv6Addr, message: &VmMessage) {
        if let Some(agent) = &self.agent {
            self.transmits.push_back(Transmit {
                ifindex: agent.ifindex,
                to,
                bytes: message.encode(self.transaction),
            });
        }
    }
}

#[cfg(test)]
mod tests;
