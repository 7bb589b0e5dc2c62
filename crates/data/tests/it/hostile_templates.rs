//! Chat templates that come with somebody's model and want to end the program, or never to end.

use hydralora_data::{ChatTemplate, Message};
use std::time::{Duration, Instant};

/// Renders, whatever comes of it, in the time that a hostile template may take.
fn outcome(source: &str) -> Result<String, String> {
    let started = Instant::now();
    let conversation = [Message::user("What is it?"), Message::assistant("That.")];
    let result = ChatTemplate::from_source_at("hostile", source, 0)
        .and_then(|template| template.render(&conversation, true, "<s>", "</s>"));
    let took = started.elapsed();
    let shown: String = source.chars().take(200).collect();
    assert!(took < Duration::from_secs(20), "{took:?}: {shown}");
    result.map_err(|error| error.to_string())
}

fn refused(source: &str) -> String {
    match outcome(source) {
        Err(message) => message,
        Ok(text) => {
            let (source, text) = (&source[..source.len().min(300)], &text[..text.len().min(99)]);
            panic!("{source} rendered as {text}");
        }
    }
}

#[test]
fn values_that_hold_themselves_are_refused() {
    for end in
        ["{{ ns }}", "{{ ns | upper }}", "{{ ns ~ 1 }}", "{{ ns == other }}", "{{ ns | tojson }}"]
    {
        let own = "{% set ns = namespace() %}{% set other = namespace() %}{% set ns.a = ns %}";
        let message = refused(&[own, end].concat());
        assert!(message.contains("cannot hold a namespace"), "{message}");
        let listed = "{% set ns = namespace() %}{% set other = namespace() %}{% set ns.a = [ns] %}\
                      {% set other.a = [other] %}";
        let message = refused(&[listed, end].concat());
        assert!(message.contains("more than 500"), "{end}: {message}");
    }
}

/// A list that holds another one 2⁶⁰ times, walked in every way there is.
#[test]
fn walks_over_shared_lists_are_paid_for() {
    let steps = [
        "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% set ns.m = {'a': ns.m, 'b': ns.m} %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = (ns.l, ns.l) %}{% set ns.m = (ns.m, ns.m) %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = ns.l | zip(ns.l) | list %}{% set ns.m = ns.m | zip(ns.m) | list %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = (ns.l * 2) | batch(2) | list %}{% set ns.m = (ns.m * 2) | batch(2) | list %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = dict(a=ns.l, b=ns.l) %}{% set ns.m = dict(a=ns.m, b=ns.m) %}{% endfor %}",
    ];
    let ways = [
        "{{ ns.l }}",
        "{{ ns.l | upper }}",
        "{{ ns.l | string }}",
        "{{ ns.l ~ '' }}",
        "{{ '' ~ ns.l }}",
        "{{ ns.l == ns.m }}",
        "{{ ns.l != ns.m }}",
        "{{ ns.l < ns.m }}",
        "{{ ns.l in [ns.m] }}",
        "{{ ns.l not in [1, ns.m] }}",
        "{{ {ns.l: 1} }}",
        "{{ {'a': 1}[ns.l] }}",
        "{{ [ns.l, ns.m] | unique | list }}",
        "{{ [ns.l, ns.m] | sort }}",
        "{{ [ns.l, ns.m] | min }}",
        "{{ ns.l | pprint }}",
        "{{ ns.l | replace('a', 'b') }}",
        "{{ 'a' | replace('a', ns.l) }}",
        "{{ ns.l | title }}",
        "{{ ns.l | capitalize }}",
        "{{ ns.l | lower }}",
        "{{ ns.l | trim }}",
        "{{ ns.l | escape }}",
        "{{ ns.l | urlencode }}",
        "{{ ns.l | indent }}",
        "{{ ns.l | format }}",
        "{{ '%s' | format(ns.l) }}",
        "{{ '%s' % ns.l }}",
        "{{ '%s' % (ns.l,) }}",
        "{{ '{}'.format(ns.l) }}",
        "{{ [ns.l] | join('x') }}",
        "{{ [1] | join(ns.l) }}",
        "{{ ns.l | tojson }}",
        "{{ 1 | tojson(separators=[ns.l, 'a']) }}",
        "{{ ns.l is eq(ns.m) }}",
        "{{ ns.l is in([ns.m]) }}",
        "{{ [ns.l] | select('eq', ns.m) | list }}",
        "{{ [ns.l] | map('upper') | list }}",
        "{{ [{'a': ns.l}] | selectattr('a', 'equalto', ns.m) | list }}",
        "{{ [{'a': ns.l}, {'a': ns.m}] | groupby('a') | list }}",
        "{{ [ns.m].index(ns.l) }}",
        "{{ [ns.m].count(ns.l) }}",
        "{{ {'a': 1}.get(ns.l) }}",
        "{{ raise_exception(ns.l) }}",
        "{{ ns.l is startingwith('a') }}",
        "{{ 'a'.startswith(ns.l) }}",
        "{{ 'a'.split(ns.l) }}",
        "{{ strftime_now(ns.l) }}",
        "{% for i in [1, 2] %}{{ loop.changed(ns.l) }}{% endfor %}",
        "{% filter replace('a', ns.l) %}a{% endfilter %}",
        "{% set x | replace('a', ns.l) %}a{% endset %}{{ x }}",
        "{% autoescape ns.l %}{{ 1 }}{% endautoescape %}",
        "{% if ns.l == ns.m %}a{% endif %}",
        "{% macro f(a=ns.l ~ '') %}{{ a }}{% endmacro %}{{ f() }}",
    ];
    for (index, step) in steps.into_iter().enumerate() {
        let start = ["{% set ns = namespace(l=[0], m=[1]) %}", step].concat();
        // All ways with the first list, every eleventh with the others.
        for way in ways.iter().skip(index).step_by(if index == 0 { 1 } else { 11 }) {
            let source = [start.as_str(), way].concat();
            if let Ok(text) = outcome(&source) {
                assert!(text.len() < 100, "{source}: {} bytes", text.len());
            }
        }
        let message = refused(&[start.as_str(), "{{ ns.l ~ '' }}"].concat());
        assert!(message.contains("steps or 256 MiB"), "{message}");
    }
}

#[test]
fn long_lists_and_texts_are_paid_for() {
    for source in [
        "{{ ([0] * 100000000) ~ '' }}",
        "{{ ([0] * 100000000) | upper }}",
        "{{ (['x' * 1000000] * 1000000) ~ '' }}",
        "{% set ns = namespace(l=[0]) %}{% for i in range(31) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | upper }}",
        "{% set ns = namespace(l=[0]) %}{% for i in range(40) %}{% set ns.l = ns.l | chain(ns.l) %}{% endfor %}{{ ns.l ~ '' }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%.1000000000f' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:01000000000d}'.format(1) }}",
        "{% set big = 'x' * 1000000 %}{{ ('{0}' * 10000).format(big) }}",
        "{% set big = 'x' * 1000000 %}{{ ('%s' * 10000) % ((big,) * 10000) }}",
        "{% set big = 'x' * 1000000 %}{{ big.replace('', big) }}",
        "{{ ' ' | indent(1000000000) }}{{ 'a\nb' | indent(1000000000) }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a' * 10000000000 }}",
    ] {
        refused(source);
    }
}

/// Trees that are deep without a bracket, which the engine's own limit does not see.
#[test]
fn deep_syntax_is_refused_or_fits() {
    let chain = |start: &str, part: &str, count: usize, end: &str| {
        ["{{ ", start, &part.repeat(count), end, " }}"].concat()
    };
    for count in [20, 500, 1_900, 50_000] {
        for source in [
            chain("", "-", count, "1"),
            chain("", "not ", count, "1"),
            chain("1", " + 1", count, ""),
            chain("1", " ~ 1", count, ""),
            chain("1", " ** 1", count, ""),
            chain("1", " and 1", count, ""),
            chain("1", " * 1", count, ""),
            chain("1", " == 1", count, ""),
            chain("a", ".a", count, ""),
            chain("a", "[0]", count, ""),
            chain("a", "()", count, ""),
            chain("1", "|int", count, ""),
            chain("1", " is odd", count, ""),
            chain("1", " if 1 else 1", count, ""),
            chain("", "[", count, &"]".repeat(count)),
            chain("", "(", count, &["1", &")".repeat(count)].concat()),
            chain("'%s'", " % '%s'", count, ""),
            chain("'a'", " % ('a'", count, &")".repeat(count)),
            chain("'a'", " \"b\" 'a'", count, ""),
            ["{% if 0 %}", &"{% elif 0 %}".repeat(count), "{% endif %}"].concat(),
            ["{% if 0 %}".repeat(count), "{% endif %}".repeat(count)].concat(),
            ["{% for a in [1] %}".repeat(count), "{% endfor %}".repeat(count)].concat(),
            "{% raw %}".repeat(count),
            "{%".repeat(count),
            "{{".repeat(count),
            "{#".repeat(count),
            "{% generation %}".repeat(count),
        ] {
            let _ = outcome(&source);
        }
    }
    let message = refused(&"x".repeat(300 << 10));
    assert!(message.contains("has 300 KiB; expected at most 256"), "{message}");
    let message = refused(&chain("", "-", 9_000, "1"));
    assert!(message.contains("more than 2000 words"), "{message}");
    // As deep as a template may well be.
    assert_eq!(outcome(&chain("1", " + 1", 60, "")).unwrap(), "61");
    assert_eq!(outcome(&chain("1", " ~ 1", 300, "")).unwrap().len(), 301);
    assert_eq!(outcome(&chain("' a '", "|trim", 120, "")).unwrap(), "a");
}

#[test]
fn recursion_of_macros_and_loops_ends() {
    for source in [
        "{% macro f(a) %}{{ f(a) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(a) %}{{ f([a, a]) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(a) %}{% call f(a) %}{% endcall %}{% endmacro %}{{ f(1) }}",
        "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% include 'chat_template' %}",
        "{% extends 'chat_template' %}",
        "{% import 'chat_template' as a %}",
        "{% from 'chat_template' import a %}",
    ] {
        refused(source);
    }
}

/// What ordinary templates do costs next to nothing, however long the conversation.
#[test]
fn long_conversations_still_render() {
    let turns: Vec<Message> = (0..3000)
        .flat_map(|n| {
            [Message::user(format!("Question {n}?")), Message::assistant("y".repeat(200))]
        })
        .collect();
    let source = "{% set ns = namespace(seen=[], last='') %}{% for m in messages %}\
                  {% if m.role == 'user' and messages | length > 1 and loop.index0 in [0, 2, 4] %}*{% endif %}\
                  {% set ns.last = m.content ~ ns.last[:5] %}{% set ns.seen = ns.seen + [m] %}\
                  <{{ m.role | upper }}>{{ m['content'] | trim }}{% endfor %}{{ ns.seen | length }}";
    let template = ChatTemplate::from_source_at("ordinary", source, 0).unwrap();
    let text = template.render(&turns, true, "", "").unwrap();
    assert!(text.ends_with("6000") && text.starts_with("*<USER>Question 0?<ASSISTANT>yyy"));
}
