//! Draws panels of bars, up to three beside each other, as an SVG document.

use std::fmt::Write as _;

const PANEL_WIDTH: f64 = 520.0;
const TOP: f64 = 60.0;
const HEAD: f64 = 34.0;
const BAR: f64 = 22.0;
const GAP: f64 = 7.0;
const NAMES: f64 = 190.0;
const VALUES: f64 = 130.0;
const MARGIN: f64 = 24.0;
const COLUMNS: usize = 3;
/// Estimated width of a letter of the headline, pixels.
const LETTER: f64 = 10.0;

/// Colours that people with any colour vision tell apart (Okabe and Ito).
const COLORS: [&str; 3] = ["#0072b2", "#9a9a9a", "#d55e00"];

/// Kind of a bar, which decides its colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A result of this project.
    Own,
    /// A result of the paper or of the reference.
    Reference,
    /// A result of another method.
    Other,
}

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Name, at the left of the bar.
    pub name: String,
    /// Length, in a unit that all bars of the panel share.
    pub value: f64,
    /// Text, at the right of the bar.
    pub text: String,
    /// Kind of the result.
    pub kind: Kind,
}

/// Bars with a common scale.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Headline of the panel.
    pub title: String,
    /// Bars, from top to bottom.
    pub bars: Vec<Bar>,
}

/// Returns the picture as an SVG document.
pub fn svg(title: &str, panels: &[Panel]) -> String {
    let rows = panels.len().div_ceil(COLUMNS);
    let most = panels.iter().map(|panel| panel.bars.len()).max();
    let panel_height = HEAD + (BAR + GAP) * most.unwrap_or(0) as f64 + MARGIN;
    let headline = 2.0 * MARGIN + LETTER * title.chars().count() as f64;
    let width = MARGIN + PANEL_WIDTH * panels.len().min(COLUMNS) as f64;
    let width = width.max(headline);
    let height = TOP + panel_height * rows as f64;
    let mut out = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' \
         height='{height}' font-family='sans-serif' font-size='13' fill='#222'>\n\
         <rect width='100%' height='100%' fill='white'/>\n\
         <text x='{MARGIN}' y='32' font-size='18' font-weight='bold'>{}</text>\n",
        escape(title)
    );
    for (index, panel) in panels.iter().enumerate() {
        let x = MARGIN + PANEL_WIDTH * (index % COLUMNS) as f64;
        let y = TOP + panel_height * (index / COLUMNS) as f64;
        draw(&mut out, panel, x, y);
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, panel: &Panel, x: f64, y: f64) {
    let _ = writeln!(
        out,
        "<text x='{x}' y='{}' font-weight='bold'>{}</text>",
        y + 18.0,
        escape(&panel.title)
    );
    let values = panel.bars.iter().map(|bar| bar.value);
    let longest = values.fold(f64::MIN_POSITIVE, f64::max);
    let left = x + NAMES;
    for (index, bar) in panel.bars.iter().enumerate() {
        let top = y + HEAD + (BAR + GAP) * index as f64;
        let length = bar.value.max(0.0) / longest * (PANEL_WIDTH - NAMES - VALUES - MARGIN);
        let color = match bar.kind {
            Kind::Own => COLORS[0],
            Kind::Reference => COLORS[1],
            Kind::Other => COLORS[2],
        };
        let base = top + BAR - 6.0;
        let _ = writeln!(
            out,
            "<text x='{}' y='{base}' text-anchor='end'>{}</text>\
             <rect x='{left}' y='{top}' width='{length:.1}' height='{BAR}' fill='{color}'/>\
             <text x='{:.1}' y='{base}'>{}</text>",
            left - 8.0,
            escape(&bar.name),
            left + length + 6.0,
            escape(&bar.text),
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longest_bar_fills_the_panel_and_the_others_are_in_proportion() {
        let bar = |name: &str, value, kind| Bar {
            name: name.to_owned(),
            value,
            text: format!("{value} <ns>"),
            kind,
        };
        let panel = Panel {
            title: "1400 bytes & 1 TAP".to_owned(),
            bars: vec![
                bar("native", 100.0, Kind::Reference),
                bar("tc", 50.0, Kind::Own),
            ],
        };
        let svg = svg("CPU", &vec![panel; 4]);
        assert!(svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<rect").count(), 1 + 4 * 2);
        let full = PANEL_WIDTH - NAMES - VALUES - MARGIN;
        assert_eq!(svg.matches(&format!("width='{full:.1}'")).count(), 4);
        assert_eq!(
            svg.matches(&format!("width='{:.1}'", full / 2.0)).count(),
            4
        );
        assert!(svg.contains("1400 bytes &amp; 1 TAP") && svg.contains("&lt;ns&gt;"));
    }
}
