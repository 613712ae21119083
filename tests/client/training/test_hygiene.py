"""What ``[data]`` sets aside: identifiers of nine countries, secrets, duplicates, broken, old and surplus texts."""

import json
import random
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import pytest
from faker import Faker

from aggregation.errors import ConfigError, DataError
from client.training import hygiene
from client.training.examples import MAX_TEXT, parse_examples
from client.training.hygiene import DAY, HygieneSettings, clean, identifiers, read_clean, with_taught, without
from edgeadapt.bases.markedwords import marked
from edgeadapt.formats.settings import Settings
from simulations.data import projects
from simulations.data.households.sampling import PopulationSettings, sample_population
from tests.support import refused
from tests.support.growth import LINEAR, growth, repeated

LOCALES = ("en_US", "en_GB", "de_DE", "fr_FR", "es_ES", "it_IT", "nl_NL", "pl_PL", "pt_PT")
ON, OFF = HygieneSettings(), HygieneSettings(remove=())
SEED = 20_261_202  # of this test alone: the patterns were chosen on others
EACH = 40  # identifiers of each kind and locale
NOW = datetime(2026, 12, 2, tzinfo=UTC).timestamp()
NATIONAL = {"de_DE": "rvnr", "es_ES": "nie"}  # for these, and for Portugal, ``ssn`` is that of the United States
AT_LEAST = {"email": 0.99, "phone": 0.95, "iban": 0.99, "card": 0.99, "national number": 0.95}


def lines(*rows: dict[str, Any] | str) -> bytes:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows).encode()


def reasons(*texts: str, settings: HygieneSettings = ON) -> list[str | None]:
    found = clean(lines(*({"text": text, "label": 0} for text in texts)), settings, NOW).aside
    return [found.get(number) for number in range(1, len(texts) + 1)]


@pytest.fixture(scope="module")
def phrases() -> list[str]:
    """What 18 households say in nine languages, of which a third has numbers."""
    settings = PopulationSettings(households=18, languages=("all",), utterances_min=60, utterances_max=60)
    clients = sample_population(settings, SEED).clients
    return [one.text for client in clients for one in (*client.train, *client.validation)]


def ordinary(rng: random.Random) -> str:
    """A number that a person says at home and that identifies nobody."""
    day, month, year, hour, minute = (rng.randint(*b) for b in ((1, 28), (1, 12), (2020, 2030), (0, 23), (0, 59)))
    low, high = rng.randint(1, 120), rng.randint(100, 9999)
    return rng.choice(
        [
            f"at {hour}:{minute:02}",
            f"from {hour}:{minute:02} to 23:59:59",
            f"on {day:02}.{month:02}.{year}",
            f"on {day}.{month}.{year} {hour}:{minute:02}",
            f"on {month:02}/{day:02}/{year}",
            f"on {year}-{month:02}-{day:02}T{hour:02}:{minute:02}",
            f"for {low} minutes and {minute} seconds",
            f"to {low / 5:.1f} degrees",
            f"in room {high}",
            f"in rooms {high}, {high + 1} and {high + 2}",
            f"{low},{minute:02} euros",
            f"{low}.{high % 900 + 100}.{high % 800 + 100} steps",
            f"color {low} {high % 255} {minute}",
            f"zip {high * 10}",
            f"scenes {day}, {month}, {hour}, {minute}",
            f"in {year}-{year + 1}",
        ]
    )


def test_identifiers_of_nine_countries_are_found_in_phrases_and_ordinary_numbers_are_not(phrases: list[str]) -> None:
    rng, found, right = random.Random(SEED), Counter[str](), 0  # noqa: S311
    for locale in LOCALES:
        fake = Faker(locale)
        fake.seed_instance(f"{SEED} {locale}")
        national = getattr(fake, NATIONAL.get(locale, "ssn"))
        makers = {"email": fake.email, "phone": fake.phone_number, "iban": fake.iban, "card": fake.credit_card_number}
        for kind, maker in (makers | {"national number": national}).items():
            for _ in range(EACH):
                words = rng.choice(phrases).split()
                words.insert(rng.randint(0, len(words)), maker())
                kinds = set(identifiers(" ".join(words), ON.countries))
                found[kind] += kind in kinds
                right += bool(kinds)
    recall = {kind: found[kind] / (EACH * len(LOCALES)) for kind in AT_LEAST}
    clean_phrases = [text for one in phrases for text in (one, f"{one} {ordinary(rng)}", f"{ordinary(rng)} {one}")]
    wrong = sum(any(identifiers(text, ON.countries)) for text in clean_phrases)
    print(f"recall {recall}, {right} phrases with identifiers, {wrong} of {len(clean_phrases)} without")
    assert {kind: value for kind, value in recall.items() if value < AT_LEAST[kind]} == {}
    assert right / (right + wrong) >= 0.98, recall
    assert wrong / len(clean_phrases) <= 0.01


def test_secrets_are_found_and_names_of_things_are_not() -> None:
    rng = random.Random(SEED)  # noqa: S311
    long = ["".join(rng.choices(ascii_letters + digits, k=40)) for _ in range(200)]
    secrets = [
        "the key is -----BEGIN OPENSSH PRIVATE KEY-----",
        "use ghp_abcdefghijklmnopqrstuvwxyzabcdefghij",
        "AKIAABCDEFGHIJKLMNOP",
        "sk-abcdefghijklmnopqrstuvwx please",
        "eyJhbGciOiJub25lIn0.eyJhIjowfQ.",
    ]
    only = HygieneSettings(remove=("secrets",))
    assert reasons(*secrets, settings=only) == ["secret"] * 5
    assert reasons(*long, settings=only).count("secret") >= 0.95 * len(long)
    names = ["Donaudampfschifffahrtsgesellschaft 2", "light.living_room_lamp_2_left_3", "LivingRoomLampLeftSide3"]
    assert reasons(*names, "ask-me-anything-about-it-later", "a risk-taking household", "AKIA") == [None] * 6


CODE_SECRETS = (
    'password = "tulip"',
    "db_password='correct horse battery'",
    'passwd: str | None = b"tulip"',
    'login(user, passphrase="a b c")',
    '{"api_key": "abc-def-ghi"}',
    'const apiKey = "abc-def"; // client_secret := "abcd"',
    "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "export DB_PASS=tulips",
    '    auth_token = "ghx7812"',
    'headers = {"Authorization": "Bearer mF_9.B5f"}',
    "Authorization: Basic YWRtaW46dHVsaXA=",
    'connect("postgres://anna:pw@localhost/app")',
    "redis://:tulip@cache:6379/0",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEA",
    'KEYS = "AKIAABCDEFGHIJKLMNOP"',
)
CODE_NAMES = (
    'password = getpass("Password: ")',
    'token == "identifier" or password != "tulip"',
    'pad_token="[PAD]", password="{password}"',
    "Authorization: Bearer $TOKEN",
    "def login(self, user=None, password=None, secret: str = '') -> None:",
    'bypass = "nothing"; tokens = ["alpha", "beta"]; token = self.token',
    "http://localhost:8080/path and postgres://host/app, {scheme}://{user}:{password}@host",
    "if (API_KEY==other) { compass = 'north'; }",
    "-----BEGIN CERTIFICATE-----",
)


def test_in_code_the_pieces_with_a_secret_are_set_aside_and_no_others() -> None:
    pieces = [row["text"] for row in projects.rows()]
    clean_pieces = [text for text, reason in zip(pieces, reasons(*pieces), strict=True) if reason is None]
    assert len(clean_pieces) >= 0.99 * len(pieces)
    planted = {
        7 * place: f"{clean_pieces[7 * place]}    {line}\n    return None\n" for place, line in enumerate(CODE_SECRETS)
    }
    names = {7 * place + 1: f"{clean_pieces[place]}{line}\n" for place, line in enumerate(CODE_NAMES)}
    mail = {3: f"# of anna@home.example\n{clean_pieces[3]}"}
    texts = [(planted | names | mail).get(place, text) for place, text in enumerate(clean_pieces)]
    expected = {place + 1: "secret" for place in planted} | {4: "email"}
    assert clean(lines(*({"text": text} for text in texts)), ON, NOW).aside == dict(sorted(expected.items()))


def test_broken_and_long_texts_are_set_aside_and_other_scripts_are_not() -> None:
    broken = ["light \ufffd off", "li\x00ght", "\x1b[31mred", "TÃ¼r Ã¶ffnen im WohnzimmerÂ", "\ud800"]
    assert reasons(*broken) == ["broken"] * 5
    assert reasons("a" * (MAX_TEXT + 1), "Tür öffnen", "打开灯", "включи свет", "two\nlines\there") == [
        "long",
        *[None] * 4,
    ]


def test_a_duplicate_has_the_same_words_prompt_and_label() -> None:
    raw = lines(
        {"text": "Light on!", "label": 0},
        {"text": " light   ON", "label": 0},
        {"text": "light on", "label": 1},
        {"text": "light off", "label": 0},
        {"text": "light on", "prompt": "what?"},
        {"text": "light on", "prompt": "What"},
    )
    assert clean(raw, ON, NOW).aside == {2: "duplicate", 6: "duplicate"}
    assert clean(raw, OFF, NOW).aside == {}


def test_of_a_text_with_marks_each_word_is_an_example_and_none_hides_what_the_text_says() -> None:
    said = [json.dumps({"text": text, "label": 0}) for text in marked("light on please")]
    phone = [json.dumps({"text": text, "label": 0}) for text in marked("call +49 30 901820 please")]
    found = clean("\n".join([*said, *phone, said[1]]).encode(), ON, NOW).aside
    assert found == {**dict.fromkeys(range(4, 4 + len(phone)), "phone"), 4 + len(phone): "duplicate"}


def test_the_other_lines_keep_their_bytes_and_numbers_and_the_prompt_counts() -> None:
    raw = b"\xef\xbb\xbf" + lines(
        {"text": "light on", "label": 0}, "", {"text": "call me@home.example", "label": 0}, '{"text":  "x", "label": 1}'
    )
    cleaned = clean(raw, ON, NOW)
    assert cleaned.raw.split(b"\n") == [
        lines({"text": "light on", "label": 0}),
        b"",
        b"",
        b'{"text":  "x", "label": 1}',
    ]
    assert (cleaned.lines, str(cleaned)) == (3, "1 of 3 examples are set aside: 1 email")
    assert clean(lines({"text": "yes", "prompt": "is it me@home.example?"}), ON, NOW).aside == {1: "email"}
    assert "home.example" not in repr(cleaned)


def test_what_is_no_example_stays_for_the_reader_to_refuse() -> None:
    wrong = lines("[1, 2]", "nothing", '{"text": 3}', '{"text": "x", "prompt": 1}', "[" * 10**5, "")
    assert clean(wrong, ON, NOW).raw == wrong
    assert clean(b"", ON, NOW).lines == 0
    with refused(DataError, "example"):
        parse_examples(clean(wrong, ON, NOW).raw, Path("x"), 0)
    with refused(DataError, "examples"):
        clean(b"\xff\xfe", ON, NOW)


def test_lines_are_removed_by_any_of_their_texts_and_no_key_or_number_is_one() -> None:
    stays = lines({"text": "lights on", "split": "train", "label": 3}, "", "[1]")
    raw = b"\n".join(
        [stays, lines({"text": "x", "prompt": "Anna?"}, '{"text": "An\\u006ea"}', "Anna"), b"\xff Anna", b""]
    )
    assert without(raw, lambda text: "Anna" in text) == (stays + b"\n", 4)
    assert without(raw, lambda text: text in ("text", "3", "label")) == (raw, 0)
    assert without(b"", lambda _: True) == (b"", 0)


def test_retention_keeps_what_has_no_time_and_the_newest_of_the_rest() -> None:
    raw = lines(
        {"text": "a"},
        {"text": "b", "time": NOW - 31 * DAY},
        {"text": "c", "time": "2026-12-01"},
        {"text": "d", "time": "2026-11-30T12:00:00+01:00"},
        {"text": "e", "time": NOW},
        {"text": "f", "time": "yesterday"},
        {"text": "g", "time": float("nan")},
        {"text": "h", "time": 10**400},
    )
    assert clean(raw, OFF, NOW).aside == {}
    assert clean(raw, OFF, NOW).untimed == 1
    days = OFF.model_copy(update={"days": 30})
    assert clean(raw, days, NOW).aside == dict.fromkeys((2, 6, 7, 8), "old")
    most = OFF.model_copy(update={"most": 2})
    assert set(clean(raw, most, NOW).aside) == {2, 4, 6, 7, 8}
    both = clean(raw, days.model_copy(update={"most": 1}), NOW).aside
    assert both == dict.fromkeys((2, 6, 7, 8), "old") | dict.fromkeys((3, 4), "surplus")
    same = lines({"text": "a", "time": 1}, {"text": "A", "time": 2}, {"text": "b", "time": 0})
    assert clean(same, ON.model_copy(update={"most": 1}), NOW).aside == {1: "duplicate", 3: "surplus"}


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1 ",
        "+1(",
        "a@",
        "A1 ",
        "GB12 ",
        "eyJ-",
        "sk-",
        "0 ",
        "+4912345678 ",
        "-----BEGIN ",
        "1.1.1",
        "Ã©",
        "a1",
        "x=",
        "password: ",
        "TOKEN",
        "A_KEY=",
        "aa://:",
        "Authorization: ",
    ],
)
def test_a_hostile_text_takes_no_longer_than_others(piece: str) -> None:
    begun = time.process_time()
    reasons((piece * MAX_TEXT)[:MAX_TEXT])
    assert time.process_time() - begun < 1.0


def test_settings_that_cannot_be_met_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device(Settings):
        data: HygieneSettings | None = None

    with refused(ConfigError, "data") as caught:
        Device.parse({"data": {"countries": ["Germany"]}}, "device.toml")
    assert "ISO 3166" in str(caught.value)
    with refused(ConfigError, "data.days"):
        Device.parse({"data": {"days": -1}}, "device.toml")
    monkeypatch.setattr(hygiene, "find_spec", lambda _: None)
    with refused(ConfigError, "data") as caught:
        Device.parse({"data": {}}, "device.toml")
    assert str(caught.value).endswith("pip install 'edgeadapt[data]'")
    assert Device.parse({"data": {"remove": ["secrets", "duplicates"]}}, "device.toml").data


def test_a_library_that_fails_is_named_without_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(lines({"text": "light on"}))

    def fail(text: str, *_: object) -> None:
        raise ValueError(text)

    monkeypatch.setattr(hygiene, "identifiers", fail)
    with refused(DataError, "examples") as caught:
        read_clean(path, ON)
    assert "light" not in str(caught.value)
    assert read_clean(path, None) == path.read_bytes()


def test_what_was_taught_replaces_lines_of_the_same_words_and_no_others() -> None:
    first, broken = b'\xef\xbb\xbf{"text": "Play JAZZ!", "label": 0}', b"\xff{"
    answer = b'{"text": "yes", "prompt": "play jazz?"}'
    raw = b"\n".join([first, b'{"text": "train", "label": 1, "split": "train"}', broken, answer, b""])
    taught = b'{"text": "play jazz", "label": 2}\n'
    assert with_taught(raw, taught).split(b"\n") == [b"", *raw.split(b"\n")[1:3], b"", b"", taught.strip(), b""]
    assert with_taught(raw, b"") == raw
    assert with_taught(raw, b'{"text": "?!", "label": 2}\n').startswith(raw)


def test_corrections_beyond_the_limit_of_the_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples.jsonl").write_bytes(b"{}\n")
    monkeypatch.setattr("client.training.hygiene.MAX_FILE", 8)
    assert read_clean(tmp_path / "examples.jsonl", None, b"{}\n") == b"{}\n\n{}\n"
    with refused(DataError, "examples"):
        read_clean(tmp_path / "examples.jsonl", None, b"{ }\n{}\n")


# A stranger may have written the file.

UNITS = (
    *(
        "a",
        "1",
        " ",
        "1 ",
        "a1",
        "a ",
        "-",
        ".",
        "A_",
        "(",
        "+1",
        "1-1-",
        "1/1/",
        "1:1",
        "1() ",
        '"',
        "'",
        "=",
        "[",
        "{",
        "\\",
        "|",
    ),
    *(
        "pass",
        "pass:",
        "pass: ",
        "pass : a",
        "token[",
        " :a",
        "PASS=",
        "X_KEY=(",
        "pass = '{",
        'authorization"',
        "authorization: basic ",
    ),
    *(
        "://",
        "ab://x:",
        "ab://",
        "@a",
        "a@b",
        "a@b.",
        "sk-a",
        "eyJa",
        "eyJaaaaaaaa.",
        "-----BEGIN A",
        "AB12",
        "AB12 ",
        "AAAAAAA1",
    ),
    *(
        "+49 30 1234567 ",
        "4111111111111111 ",
        "123456789012345678901234567890123 ",
        "DE12345678901234567890 ",
        "Ã©",
        "â€",
        "١ ",
    ),
    *("\u0301\u0316", "a\u0301\u0316", "\uff9e\u0301", "\ufdfa", "\U000e0001", "_\u0301"),
)


@pytest.mark.parametrize("after", ["", "!"])
def test_examples_of_any_shape_are_cleaned_in_linear_time(after: str) -> None:
    def read(text: str) -> None:
        clean(lines({"text": text, "label": 0}), ON, NOW)

    read("")  # imports what it needs
    found = {unit: growth(read, repeated(unit, "", after), MAX_TEXT) for unit in UNITS}
    assert {unit: power for unit, power in found.items() if power >= LINEAR} == {}


def test_lines_are_compared_with_what_was_taught_in_linear_time() -> None:
    def read(text: str) -> None:
        with_taught(lines({"text": text, "label": 0}), lines({"text": "on", "label": 0}))

    found = {unit: growth(read, repeated(unit), 2**18) for unit in UNITS}
    assert {unit: power for unit, power in found.items() if power >= LINEAR} == {}
