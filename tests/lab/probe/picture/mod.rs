//! Picture of a migration as SVG: sequence number over host time.

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Write as _,
};

use super::{
    log::Sent,
    metrics::{Arrival, Window},
};

const WIDTH: f64 = 1100.0;
const HEIGHT: f64 = 640.0;
const LEFT: f64 = 90.0;
const RIGHT: f64 = 30.0;
const TOP: f64 = 150.0;
const BOTTOM: f64 = 70.0;
/// Top of the first row of phase names, and the distance of the rows.
const PHASE_TOP: f64 = 84.0;
const PHASE_ROW: f64 = 20.0;
const PHASE_ROWS: usize = 3;

/// Colours that people with any colour vision tell apart (Okabe and Ito).
const SENT_COLOR: &str = "#9a9a9a";
const LOST_COLOR: &str = "#d55e00";
const DUPLICATE_COLOR: &str = "#cc79a7";
const HOST_COLORS: [&str; 4] = ["#0072b2", "#009e73", "#e69f00", "#56b4e9"];
const PHASE_COLORS: [&str; 4] = ["#56b4e9", "#f0e442", "#d55e00", "#009e73"];

/// A phase of the migration, e.g. signalling, copy, pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    /// Name in the picture.
    pub name: String,
    /// Start, in nanoseconds of the host's monotonic clock.
    pub from_ns: u64,
    /// End, in the same clock.
    pub to_ns: u64,
}

/// A named moment, e.g. the resume of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Name in the picture.
    pub name: String,
    /// Time of the moment, in nanoseconds of the host's monotonic clock.
    pub at_ns: u64,
}

/// Data from which [`svg`] draws a picture.
#[derive(Clone, Debug)]
pub struct Picture<'a> {
    /// Headline of the picture.
    pub title: &'a str,
    /// Packets sent, of all flows.
    pub sent: &'a [Sent],
    /// Packets that arrived, of all flows, in the order of time.
    pub arrivals: &'a [Arrival],
    /// Number of the flow to draw.
    pub flow: u16,
    /// Names of the VM hosts, indexed by [`Arrival::host`].
    pub hosts: &'a [&'a str],
    /// Phases of the migration, in the order of time.
    pub phases: &'a [Phase],
    /// Moments, drawn as dashed lines.
    pub marks: &'a [Mark],
    /// Time to draw. The start of the first phase is zero on the axis.
    pub window: Window,
}

/// Linear map from data values to coordinates of the picture.
struct Scale {
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Scale {
    fn at(&self, value: f64) -> f64 {
        let span = (self.to - self.from).max(f64::MIN_POSITIVE);
        self.start + (value - self.from) / span * (self.end - self.start)
    }
}

/// Returns the picture as an SVG document.
pub fn svg(picture: &Picture<'_>) -> String {
    let Window { from_ns, to_ns } = picture.window;
    let is_inside = |ns: u64| (from_ns..to_ns).contains(&ns);
    let sent: Vec<_> = picture
        .sent
        .iter()
        .filter(|packet| packet.flow == picture.flow && is_inside(packet.sent_ns))
        .collect();
    let arrivals: Vec<_> = picture
        .arrivals
        .iter()
        .filter(|arrival| arrival.flow == picture.flow && is_inside(arrival.host_ns))
        .collect();
    let zero_ns = picture
        .phases
        .first()
        .map_or(from_ns, |phase| phase.from_ns);
    let ms = |ns: u64| (ns as f64 - zero_ns as f64) / 1e6;
    // The axis also has to cover old packets that arrive late: their numbers are below the numbers
    // that are sent in the window.
    let numbers = sent.iter().map(|packet| packet.sequence);
    let numbers = numbers.chain(arrivals.iter().map(|arrival| arrival.sequence));
    let first = f64::from(numbers.clone().min().unwrap_or(0));
    let last = f64::from(numbers.max().unwrap_or(1));
    let x = Scale {
        from: ms(from_ns),
        to: ms(to_ns),
        start: LEFT,
        end: WIDTH - RIGHT,
    };
    let y = Scale {
        from: first,
        to: last,
        start: HEIGHT - BOTTOM,
        end: TOP,
    };

    let mut out = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' \
         height='{HEIGHT}' font-family='sans-serif' font-size='13' fill='#222'>\n\
         <rect width='100%' height='100%' fill='white'/>\n\
         <text x='{LEFT}' y='30' font-size='18' font-weight='bold'>{}</text>\n",
        escape(picture.title)
    );
    draw_phases(&mut out, picture, &x, ms);
    draw_axes(&mut out, &x, &y);

    let points: Vec<_> = sent
        .iter()
        .map(|packet| (x.at(ms(packet.sent_ns)), y.at(f64::from(packet.sequence))))
        .collect();
    let _ = write!(out, "<polyline fill='none' stroke='{SENT_COLOR}' points='");
    for (px, py) in thin(&points) {
        let _ = write!(out, "{px:.1},{py:.1} ");
    }
    out.push_str("'/>\n");

    let mut by_color: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
    let mut hosts_seen = HashSet::new();
    // A packet that arrived before the window counts as a copy when it arrives again.
    let before = picture
        .arrivals
        .iter()
        .filter(|arrival| arrival.host_ns < from_ns);
    let mut seen: HashSet<u32> = before
        .filter(|arrival| arrival.flow == picture.flow)
        .map(|arrival| arrival.sequence)
        .collect();
    let mut duplicates = 0;
    for arrival in &arrivals {
        let is_new = seen.insert(arrival.sequence);
        duplicates += u64::from(!is_new);
        hosts_seen.insert(arrival.host);
        let color = if is_new {
            host_color(arrival.host)
        } else {
            DUPLICATE_COLOR
        };
        let point = (x.at(ms(arrival.host_ns)), y.at(f64::from(arrival.sequence)));
        by_color.entry(color).or_default().push(point);
    }
    let all: HashSet<u32> = picture
        .arrivals
        .iter()
        .filter(|arrival| arrival.flow == picture.flow)
        .map(|arrival| arrival.sequence)
        .collect();
    let lost: Vec<_> = sent
        .iter()
        .zip(&points)
        .filter(|(packet, _)| !all.contains(&packet.sequence))
        .map(|(_, point)| *point)
        .collect();
    let lost_count = lost.len();
    by_color.insert(LOST_COLOR, lost);
    for (color, points) in &by_color {
        let _ = write!(
            out,
            "<path fill='none' stroke='{color}' stroke-width='3.2' \
                             stroke-linecap='round' d='"
        );
        for (px, py) in thin(points) {
            let _ = write!(out, "M{px:.1} {py:.1}h0");
        }
        out.push_str("'/>\n");
    }

    let mut legend = vec![(SENT_COLOR, "sent".to_owned())];
    for (host, name) in (0u8..).zip(picture.hosts) {
        if hosts_seen.contains(&host) {
            legend.push((host_color(host), format!("received on {name}")));
        }
    }
    legend.push((DUPLICATE_COLOR, format!("received again ({duplicates})")));
    legend.push((
        LOST_COLOR,
        format!("lost ({lost_count}), where it was sent"),
    ));
    let mut at = LEFT;
    for (color, text) in legend {
        let _ = writeln!(
            out,
            "<circle cx='{}' cy='53' r='5' fill='{color}'/><text x='{}' y='58'>{}</text>",
            at + 5.0,
            at + 16.0,
            escape(&text)
        );
        at += 44.0 + 7.2 * text.chars().count() as f64;
    }
    out.push_str("</svg>\n");
    out
}

fn draw_phases(out: &mut String, picture: &Picture<'_>, x: &Scale, ms: impl Fn(u64) -> f64) {
    let clamp = |ns: u64| x.at(ms(ns)).clamp(LEFT, WIDTH - RIGHT);
    let bottom = HEIGHT - BOTTOM;
    for (index, phase) in picture.phases.iter().enumerate() {
        let (from, to) = (clamp(phase.from_ns), clamp(phase.to_ns));
        let color = PHASE_COLORS[index % PHASE_COLORS.len()];
        let row = PHASE_TOP + PHASE_ROW * (index % PHASE_ROWS) as f64;
        // A name that would cross the right edge stands left of the phase's end.
        let text = format!(
            "{} {}",
            phase.name,
            duration(phase.to_ns.abs_diff(phase.from_ns))
        );
        let is_far = from + 7.2 * text.len() as f64 > WIDTH - RIGHT;
        let (anchor, at) = if is_far {
            ("end", to - 4.0)
        } else {
            ("start", from + 4.0)
        };
        let _ = writeln!(
            out,
            "<rect x='{from:.1}' y='{row}' width='{:.1}' height='{:.1}' fill='{color}' \
             fill-opacity='0.22'/>\n<path d='M{from:.1} {row}V{bottom}' stroke='{color}'/>\n\
             <text x='{at:.1}' y='{}' text-anchor='{anchor}'>{}</text>",
            (to - from).max(1.5),
            bottom - row,
            row + 14.0,
            escape(&text),
        );
    }
    for (index, mark) in picture.marks.iter().enumerate() {
        let at = clamp(mark.at_ns);
        // The name stands right of the line and low, where the rising curve leaves room.
        let text_y = bottom - 12.0 - PHASE_ROW * (index % PHASE_ROWS) as f64;
        let is_far = at + 7.2 * mark.name.len() as f64 > WIDTH - RIGHT;
        let (anchor, text_x) = if is_far {
            ("end", at - 5.0)
        } else {
            ("start", at + 5.0)
        };
        let _ = writeln!(
            out,
            "<path d='M{at:.1} {TOP}V{bottom}' stroke='#444' stroke-dasharray='5 4'/>\
             <text x='{text_x:.1}' y='{text_y}' text-anchor='{anchor}'>{}</text>",
            escape(&mark.name)
        );
    }
}

fn draw_axes(out: &mut String, x: &Scale, y: &Scale) {
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for tick in ticks(x.from, x.to) {
        let at = x.at(tick);
        let _ = writeln!(
            out,
            "<path d='M{at:.1} {TOP}V{bottom}' stroke='#000' stroke-opacity='0.08'/>\
             <text x='{at:.1}' y='{}' text-anchor='middle'>{tick}</text>",
            bottom + 20.0
        );
    }
    for tick in ticks(y.from, y.to) {
        let at = y.at(tick);
        let _ = writeln!(
            out,
            "<path d='M{LEFT} {at:.1}H{right}' stroke='#000' stroke-opacity='0.08'/>\
             <text x='{}' y='{:.1}' text-anchor='end'>{tick}</text>",
            LEFT - 8.0,
            at + 4.0
        );
    }
    let (middle_x, middle_y) = (f64::midpoint(LEFT, right), f64::midpoint(TOP, bottom));
    let _ = writeln!(
        out,
        "<path d='M{LEFT} {TOP}V{bottom}H{right}' fill='none' stroke='#444'/>\
         <text x='{middle_x}' y='{}' text-anchor='middle'>host time in ms</text>\
         <text transform='translate(24 {middle_y}) rotate(-90)' text-anchor='middle'>\
         sequence number of the packet</text>",
        HEIGHT - 18.0
    );
}

/// Returns multiples of 1, 2 or 5 times a power of ten, about ten of them.
fn ticks(from: f64, to: f64) -> Vec<f64> {
    let raw = ((to - from) / 9.0).max(1.0);
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| *step >= raw)
        .unwrap_or(raw);
    let first = (from / step).ceil() as i64;
    let last = (to / step).floor() as i64;
    (first..=last).map(|index| index as f64 * step).collect()
}

/// Drops points that would cover another point, so that the document stays small.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut seen = HashSet::new();
    let is_first = |point: &&(f64, f64)| {
        seen.insert((
            (point.0 * 2.0).round() as i64,
            (point.1 * 2.0).round() as i64,
        ))
    };
    points.iter().filter(is_first).copied().collect()
}

fn host_color(host: u8) -> &'static str {
    HOST_COLORS[usize::from(host) % HOST_COLORS.len()]
}

fn duration(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds as f64 / 1e6;
    if milliseconds < 10.0 {
        format!("{milliseconds:.1} ms")
    } else {
        format!("{milliseconds:.0} ms")
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests;
