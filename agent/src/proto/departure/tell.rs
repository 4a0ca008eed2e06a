//! Progress messages of an outgoing migration, to its requester and to its destination.

use common::signal::{MigrationProgress, VmMessage};

use super::stage::Moving;
use super::{Order, Outgoing, Requester};
use crate::proto::CommandReply;
use crate::proto::context::Context;

impl Outgoing {
    /// Tells a VM that asked for its migration how far it is: `MigrationResponse` if the
    /// destination answered, otherwise progress with phase `Preparing`.
    pub(super) fn tell_requester(&self, cx: &mut Context) {
        let Requester::Vm { transaction, to } = self.order.requester else {
            return;
        };
        let message = match self.stage.answered() {
            Some(answered) => VmMessage::from(answered.for_vm()),
            None => self.progress(cx.now).into(),
        };
        cx.tell(to, transaction, &message);
    }

    /// Sends the progress to the requester, VM or operator.
    pub(super) fn tell_progress(&self, cx: &mut Context) {
        if let Requester::Vm { transaction, to } = self.order.requester {
            let progress = self.progress(cx.now);
            cx.tell(to, transaction, &progress.into());
        }
        self.tell_operator(cx);
    }

    pub(super) fn tell_operator(&self, cx: &mut Context) {
        self.order.tell_operator(cx, &self.progress(cx.now));
    }
}

impl Order {
    pub(super) fn tell_operator(&self, cx: &mut Context, progress: &MigrationProgress) {
        if let Requester::Operator { command } = self.requester {
            let reply = CommandReply::Progress {
                phase: progress.phase,
                processed_bytes: progress.processed_bytes,
                total_bytes: progress.total_bytes,
            };
            cx.reply(command, reply);
        }
    }
}

impl Moving {
    /// Sends the progress of a started migration to the destination, with this host's clock.
    pub(super) fn tell_peer(&mut self, cx: &mut Context, order: &Order) {
        self.peer_told = cx.now;
        let progress = MigrationProgress {
            clock_ns: Some(cx.now.0),
            ..self.progress(order, cx.now)
        };
        cx.send(&order.destination, order.transaction, &progress.into());
    }
}
