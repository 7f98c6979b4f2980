"""Word lists of the synthetic documents. Every word here is meant to be one token of the bundled tokenizer."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """amber ancient azure brass bright broken bronze calm cedar central clever coastal copper coral cosmic cotton
    crystal curious dusty eager eastern ebony electric emerald faded frozen gentle giant glass golden granite hidden
    hollow humble iron ivory jade jolly lunar marble mellow misty modern narrow noble northern oaken olive outer
    pearl polar proud quiet rapid royal ruby rustic sandy secret shady silent silver sleepy solar southern steel
    stone sunny tidy timber upper velvet vivid western wild winter wooden"""
)

NOUNS = _words(
    """abbey academy airport arcade archive arena atelier bakery bank barn bridge cabin cafe canal castle cathedral
    cellar chapel cinema clinic college cottage court depot dock engine factory farm ferry forge fort foundry
    fountain gallery garage garden gate granary greenhouse hangar harbor hospital hostel hotel kitchen laboratory
    library lighthouse lodge manor market mill mine monastery museum nursery observatory office orchard palace
    pavilion pharmacy pier plaza quarry reactor refinery school shed shipyard stable stadium station studio temple
    theater tower tunnel vault vineyard warehouse windmill workshop"""
)

NAMES = _words(
    """Adam Agnes Alice Anders Anna Arthur Astrid Bella Boris Carla Cedric Clara Daniel Diana Edgar Elena Emil Esther
    Felix Fiona Frank Gloria Greta Hannah Harold Helen Hugo Ingrid Irene Isaac Jasper Joan Julia Karen Karl Laura
    Leo Linda Lucas Magnus Maria Martin Mona Nadia Nina Oliver Olga Oscar Paula Peter Quentin Rachel Robert Rosa
    Samuel Sofia Stefan Thomas Ursula Victor Wanda Walter Yvonne Zelda"""
)

CITIES = _words(
    """Ankara Athens Austin Bergen Berlin Boston Cairo Chicago Cologne Dallas Delhi Denver Dublin Florence Geneva
    Hanoi Havana Helsinki Houston Jakarta Kyoto Lagos Lima Lisbon London Lyon Madrid Manila Milan Montreal Munich
    Nairobi Naples Oslo Ottawa Paris Porto Prague Quito Riga Rome Seattle Seoul Sydney Tokyo Toronto Tunis Turin
    Vienna Warsaw Zurich"""
)

COLOURS = _words(
    """black blue brown crimson cyan gray green indigo lilac magenta maroon orange pink
    purple red scarlet teal violet white yellow"""
)

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS = _words("January February March April May June July August September October November December")

PASSWORDS = _words(
    """anchor apple banana basket beetle blanket bottle button candle carpet cherry circle clover compass cookie dragon
    eagle falcon feather forest ginger guitar hammer honey island jacket ladder lantern lemon magnet maple meadow
    mirror needle ocean otter pepper piano planet pocket puzzle rabbit ribbon river rocket saddle shadow spider
    sunset thunder tiger trumpet turtle umbrella walnut whistle willow window zebra zipper"""
)

WEATHER = _words("cloudy rainy foggy windy stormy snowy warm cold humid mild dry clear")

THINGS = _words(
    """boxes papers letters tools maps chairs lamps books ropes barrels crates wheels stamps photographs tickets keys
    coins pipes cables pumps"""
)

VERBS = _words(
    """cleaned repaired counted moved painted inspected sorted replaced collected polished
    labelled stored"""
)

TIMES = (
    "in the morning",
    "in the evening",
    "after lunch",
    "before noon",
    "late at night",
    "last week",
    "this year",
    "during the summer",
    "in the spring",
    "every day",
    "at dawn",
    "on the weekend",
)

COMMON = _words(
    """a about above across act add after again against age ago agree air all allow almost along also always am among an
    and animal another answer any anyone anything appear apply are area arm around arrive art as ask at away baby back
    bad ball base be bear beat beautiful because become bed been before began begin behind being believe below best
    better between big bit body book born both box boy break bring brother build building business but buy by call came
    can capital car card care carry case catch cause century certain chance change check child children choose church
    city class close cold come common community company computer consider contain continue control cost could count
    country course cover create cross cry cut dark data day dead deal death decide deep describe design develop did die
    difference different difficult direct do doctor does dog done door down draw dream drive drop during each early
    earth easy eat economy edge education effect eight either else end energy enough even event ever every everyone
    everything example expect explain eye face fact fall family far fast father fear feel few field fight figure fill
    final find fine fire first fish five floor fly follow food foot for force foreign forget form four free friend from
    front full future game gave general get girl give go goes gone good got government great ground group grow guess
    had hair half hand happen happy hard has have he head health hear heart help her here high him himself his history
    hold home hope horse hot hour house how however human hundred idea if important in include increase indeed inside
    interest into is it its itself job join just keep kept kind king knew know land language large last later law lay
    lead learn least leave led left less let level lie life light like likely line list listen little live local long
    look lose lost lot love low machine made main major make man many mark matter may maybe me mean measure meet member
    memory men mention might million mind minute miss model moment money month more morning most mother mountain move
    much music must my name nature near need never new next nice night no none nor not note nothing now number of off
    often oh okay old on once one only open or order other our out outside over own page paper parent part party pass
    past pay people perhaps period person picture piece place plan plant play please point police poor position possible
    power present president pretty price probably problem process produce product program provide public pull purpose
    push put question quick quite race rain reach read ready real really reason receive red remain remember reply report
    rest result return rich right road room round rule run said same save saw say school science sea search season
    second see seem seen self sell send sense sent sentence serve service set seven several shall she ship short should
    show shut side sign simple since sing single sister sit six size skin sleep slow small smile so social some someone
    something sometimes son song soon sorry sort sound south speak special spend stand start state stay step still stop
    story street strong student study such sudden summer sun support sure system table take talk teach team tell ten
    test than thank that the their them then there these they thing think third this those though thought thousand three
    through time to today together told tomorrow tonight too took top total toward town travel tree tried true try turn
    two type under understand until up upon us use usual value very view visit voice wait walk wall want war was wash
    watch water way we week well went were what when where whether which while who whole whose why wide wife will wind
    wish with without woman women wonder word work world would write wrong year yes yet you young your"""
)
