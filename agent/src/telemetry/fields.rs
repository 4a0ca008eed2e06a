//! Formats the fields of an event as text on one line. Peers and libvirt choose the names in them,
//! so control characters are escaped.

use std::error::Error;
use std::fmt::{self, Debug};
use std::iter;

use common::text::Escaped;
use tracing::field::{Field, Visit};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;

/// Writes `message name=value name=value` and escapes unprintable characters.
#[derive(Debug)]
pub(super) struct PlainFields;

impl<'writer> FormatFields<'writer> for PlainFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = Visitor {
            writer,
            first: true,
            result: Ok(()),
        };
        fields.record(&mut visitor);
        visitor.result
    }
}

struct Visitor<'writer> {
    writer: Writer<'writer>,
    first: bool,
    result: fmt::Result,
}

impl Visitor<'_> {
    fn write(&mut self, field: &Field, value: &str) {
        if self.result.is_err() {
            return;
        }
        let separator = if self.first { "" } else { " " };
        self.first = false;
        let value = Escaped(value);
        self.result = match field.name() {
            "message" => write!(self.writer, "{separator}{value}"),
            name => write!(self.writer, "{separator}{name}={value}"),
        };
    }
}

impl Visit for Visitor<'_> {
    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        let causes = iter::successors(value.source(), |&cause| cause.source());
        let text = causes.fold(value.to_string(), |text, cause| format!("{text}: {cause}"));
        self.write(field, &text);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.write(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Text(Arc<Mutex<Vec<u8>>>);

    impl Write for Text {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Text {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    /// Returns the log's text of the events in `log`.
    fn logged(log: impl FnOnce()) -> String {
        let text = Text::default();
        let subscriber = tracing_subscriber::fmt()
            .fmt_fields(PlainFields)
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .with_writer(text.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = text.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn names_forge_no_lines() {
        let name = "vm1\nERROR all is lost\t\u{1b}[2J\u{202e}txt";
        let shown = "vm1\\nERROR all is lost\\t\\u{1b}[2J\\u{202e}txt";
        let line = logged(|| tracing::info!(domain = %name, "Domain {name} came"));
        let expected = format!(" INFO Domain {shown} came domain={shown}\n");
        assert_eq!(line, expected);
        let line = logged(|| tracing::info!(domain = name, "came"));
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(!line.contains(['\u{1b}', '\u{202e}']), "{line}");
    }

    #[test]
    fn error_comes_with_its_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("Cannot begin")]
        struct Outer(#[source] io::Error);
        let error = Outer(io::Error::other("bad\nluck"));
        let line = logged(|| {
            let error: &(dyn Error + 'static) = &error;
            tracing::warn!(error, count = 3, "Failed");
        });
        assert_eq!(
            line,
            " WARN Failed error=Cannot begin: bad\\nluck count=3\n"
        );
    }
}
