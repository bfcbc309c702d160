"""English: words that fill slots, templates of messages between bars, and facts with questions about them."""

from model.sgm.turkish import words

FILLERS = {
    "name": words(
        "Anna, Tom, Sarah, James, Emma, Lucas, Mia, Oliver, Alice, Henry, Ruth, Simon, Clara, Victor, Hugo, "
        "Paula, Grace, Peter, Nina, David, Kate, Ben, Ayşe, Mehmet, Zeynep, Elif, Burak, Deniz, Emre, Fatma, "
        "Selin, Can, Ali, Derya, Hakan, Leyla, Murat, Nazlı, Oğuz, Pınar"
    ),
    "rel": words(
        "sister, brother, mother, father, wife, husband, daughter, son, uncle, aunt, boss, best friend, cousin"
    ),
    "city": words(
        "London, Berlin, Ankara, Boston, Izmir, Paris, Toronto, Lisbon, Chicago, Istanbul, Oslo, Dublin"
    ),
    "country": words("Norway, Japan, Turkey, Brazil, Canada, Italy, Kenya, India, Portugal"),
    "food": words("pizza, sushi, lentil soup, strawberries, pasta, olives, peanuts, spinach, mango, fish"),
    "drink": words("black coffee, green tea, orange juice, red wine, milk, ayran, lemonade"),
    "color": words("red, blue, green, yellow, purple, black, orange, white, turquoise"),
    "animal": words("dog, cat, parrot, horse, rabbit, hamster, turtle"),
    "job": words("nurse, teacher, software engineer, carpenter, lawyer, pilot, chef, accountant, architect"),
    "company": words("Acme, Siemens, a small startup, the city hospital, Northwind, a bank, the university"),
    "hobby": words(
        "chess, hiking, painting, cycling, swimming, gardening, playing the guitar, photography, knitting"
    ),
    "thing": words("car, laptop, bike, phone, umbrella, wallet, passport, camera, jacket, suitcase"),
    "date": words("3 May, 14 February, 21 June, 30 August, 9 November, 1 January, 17 March"),
    "day": words("Monday, Tuesday, Thursday, Friday, Saturday, Sunday"),
    "when": words(
        "yesterday, last week, last summer, this morning, on Tuesday, two days ago, last night, in March"
    ),
    "topic": words(
        "autumn, a lonely robot, the sea, friendship, a lost key, the moon, a brave mouse, time travel, rain"
    ),
    "science": words(
        "gravity, photosynthesis, black holes, inflation, DNA, tides, vaccines, electricity, earthquakes"
    ),
    "famous": words("Einstein, Napoleon, Marie Curie, Mozart, Atatürk, Shakespeare, Cleopatra, Newton"),
    "lang": words("Spanish, German, Turkish, French, Japanese, Italian"),
    "order": words(
        "write, explain, summarize, translate, list, compare, calculate, suggest, define, sort, fix, describe, "
        "invent, draw, rewrite, shorten, outline, analyse, check, classify, improve, generate, solve, draft, "
        "design, proofread"
    ),
    "work": words(
        "a poem, a report, a letter, a speech, a table, a riddle, a sentence, the text, this article, a recipe, "
        "a review, a plan, the code, an essay, the numbers, a title, a menu, a lesson, the words, a dialogue, "
        "an equation, a headline"
    ),
    "subject": words(
        "the roman empire, volcanoes, the heart, electric cars, jazz, the olympic games, dinosaurs, solar panels, "
        "the stock market, bees, glaciers, chess, the human brain, football, coffee, bridges, democracy, whales, "
        "computers, rice, the internet, Mars"
    ),
    "algo": words(
        "reverses a list, sorts numbers, parses JSON, counts words, finds primes, reads a CSV file, "
        "merges two dicts"
    ),
    "task": words(
        "fix the printer, restart the router, bake the bread, back up the photos, deploy the site, "
        "clean the filter, tune the guitar"
    ),
    "trick": words(
        "hold the button for ten seconds, use cold water, update the driver first, run the script twice, "
        "start from the left, add a pinch of salt, unplug it for a minute"
    ),
}  # fmt: skip
# Nouns that a person has one of, with the slot that its value is drawn from.
ATTRIBUTES = (
    "favourite colour=color, favourite food=food, favourite drink=drink, favorite animal=animal, "
    "birthday=date, phone number=number, door code=number, wifi password=secret, shoe size=number, "
    "home town=city, dentist=name, doctor=name, dog's name=pet, cat's name=pet, job=job, employer=company, "
    "lucky number=number, native language=lang, landlord=name, best friend=name, middle name=name, "
    "hobby=hobby, locker number=number, passport number=number, email address=secret, supervisor=name, "
    "flight number=number, insurance number=number, neighbour's name=name, grandmother's name=name, "
    "nickname=pet, wedding date=date, bike=color, car=color, front door=color, sports club=company, "
    "bank=company, favourite city=city, holiday destination=country, next appointment=date, exam date=date, "
    "blood pressure=number, apartment number=number, student number=number, jacket size=number, "
    "usual breakfast=food, teacher=name, lawyer=name, hair colour=color, username=secret, alarm time=time, "
    "train=time, bedtime=time, parking space=number, tea order=drink, childhood dream=job, "
    "graduation year=year, bicycle lock code=number, team=company, piano teacher=name"
)
# Past/base.
EPISODES = (
    "went/go to the dentist, fixed/fix the roof, planted/plant a tree, cooked/cook for ten people, "
    "spoke/speak with the landlord, broke/break a window, found/find a wallet, flew/fly to Rome, "
    "won/win a prize, wrote/write a letter to the mayor, painted/paint the kitchen, cut/cut my hair, "
    "donated/donate blood, swam/swim across the lake, changed/change the oil, signed/sign the contract, "
    "left/leave the party, ordered/order new glasses, visited/visit the museum, joined/join a choir, "
    "cancelled/cancel the subscription, repaired/repair the bike, missed/miss the train, baked/bake a cake, "
    "called/call the plumber, fell/fall off a ladder, got/get a parking ticket, "
    "returned/return the library book, argued/argue with the neighbour, slept/sleep in a tent, "
    "sent/send the invoice, washed/wash the curtains, adopted/adopt a kitten, renewed/renew my passport"
)
SURNAMES = words(
    "Smith, Jones, Brown, Taylor, Wilson, Evans, Walker, Hughes, Green, Hall, Wood, Clarke, Baker, "
    "Young, King, Wright, Hill, Moore, Cooper, Ward, Turner, Morris, Cook, Bell, Murphy, Bailey, Parker, "
    "Cox, Miller, Reed, Gray, Stone, Fisher, Hunter, Palmer, Rose, Price, Barker, Holmes, Knight, Lloyd, "
    "Mason, Porter, Shaw, Walsh, Webb, West, Yates"
)
OWNERS = words("my sister, my brother, my mother, my father, my wife, my husband, my boss, my neighbour")
# Templates between bars; the order matters only in that every fifth is held out.
STORE = {
    "fact": """
My name is {name}. | I live in {city}. | I'm {age} years old. | My {rel}'s name is {name}. |
I work as a {job} at {company}. | My birthday is on {date}. | I was born in {year}. | I have a {animal} called {pet}. |
My {thing} is {color}. | I'm allergic to {food}. | I moved to {city} in {year}. | My {rel} works at {company}. |
{name} is my {rel}. | {name}'s birthday is {date}. | I have {n} cousins. | You can call me {name}. |
People call me {name}. | I grew up in {country}. | My phone number ends with {n}{n}. | My door code is {n}{n}{n}{n}. |
The password of my {thing} is {pet}{year}. | {name} lives in {city} with two kids. | My shoe size is 42. |
I drive a {color} car. | We got married in {year}. | My {rel} is from {country}. |
I study {science} at the university. | My doctor is called {name}. | Our {animal} is {n} years old. |
I speak {lang} and a little {lang}. | I'm a {job} by profession. | Our wedding anniversary is {date}. |
I keep my {thing} in the second drawer. | My flight leaves at {time} on {day}. | {name} is allergic to {food}. |
I've been living in {city} since {year}. | I'm originally from {country}. |
My new address is {n} Rose Street, {city}. | The {thing} that I bought is {color}. |
I take my pills at {time} every day. | My {rel} {name} turned {age}. | I'm married to {name}. |
I quit my job at {company}. | {name} and I are in the same team. | I like {food}. | I love {hobby}. | I hate {food}. |
My favourite colour is {color}. | My favorite food is {food}. | I prefer {drink} to {drink}. | I can't stand {food}. |
I don't eat {food}. | {name} likes {drink}. | I enjoy {hobby} on {day}s. | I'd rather have {drink} in the morning. |
I usually drink {drink}. | I'm a big fan of {hobby}. | I never put sugar in my coffee. | My {rel} prefers {food}. |
I'm really into {hobby} these days. | Please always answer me in {lang}, that's what I prefer. | I am vegetarian. |
I'm afraid of {animal}s. | The best dish for me is {food}. | My hobby is {hobby}. | {mine} is {value}. |
{value} is {mine}. | {mine} is now {value}. | {mine}: {value} | As for {mine}, it's {value}. |
Actually {mine} is {value}, not {n}. | {mine} will be {value}. | {mine} used to be {n}, now it's {value}. |
I want you to know that {mine} is {value}. | {mine} has changed to {value}. | I chose {value} as {my}. |
I've got {value} for {my}. | We both know {mine} is {value}. | {mine} has always been {value}. |
It's {value}, {mine}. | I have {n} {animal}s. | I own a {color} {thing}. | I'm learning {lang}. |
I hurt my knee and can't do {hobby}. | My {rel} doesn't eat {food}. | I have been a {job} for {n} years. |
I come from {city}. | My wife and I have {n} children. | I can't eat {food} because it makes me sick. |
I only drink {drink}. | I wake up at {time} every morning. | I go to bed at {time}. | Every {day} I go {hobby}. |
I wear glasses. | I'm left-handed. | I weigh {age} kilos. | I don't drink alcohol. | I don't like {food} at all. |
I used to live in {country}. | I used to work as a {job}. | My parents live in {city}. |
My son goes to school in {city}. | {name} works with me at {company}. | {name} has two {animal}s. |
{name}'s wife is a {job}. | {name} drives a {color} {thing}. | {name} hates {food}. | We have a house in {country}. |
Our neighbours are called {name} and {name}. | There are {n} people in my family. | I am the oldest of {n} children. |
I play in a band with {name}. | My English teacher was {name}. | I graduated from university in {year}. |
I'm saving money for a {color} {thing}. | I dream of becoming a {job}. | Blue suits me better than {color}. |
Tea is fine for me, but I like {drink} more. | My mum is {age}. | The spare key is under the {thing}. |
The meeting room is booked for us every {day}.
""",
    "episode": """
I met {name} {when}. | {when}, I went to {city} with my {rel}. | I lost my {thing} {when}. |
We had dinner with {name} {when}. | I had {food} for lunch today. | My {rel} visited me {when}. |
I bought a new {thing} {when}. | I finished reading a book about {topic} {when}. | {name} called me {when}. |
I broke my arm {when}. | I had a meeting with {name} at {time}. | We watched a film about {topic} {when}. |
I started {hobby} {when}. | I passed my driving test {when}. | Our {animal} ran away {when}. |
{name} and I went {hobby} {when}. | I sold my {color} {thing} {when}. | I saw {name} in {city} {when}. |
My {thing} was stolen {when}. | Today I ran {n} kilometres. | I have just come back from {country}. |
I'm meeting {name} on {day} at {time}. | I paid the rent {when}. | We moved house {when}. |
I gave {name} my {thing} {when}. | I {did} {when}. | {when} I {did}. | {when}, {name} and I {did}. | We {did} {when}. |
I finally {did} {when}. | {name} {did} {when}. | I {did} with {name}. | I {did} and then went home. |
My {rel} {did} {when}. | I {did} for the first time. | Guess what, I {did} {when}! | I'm going to {do} on {day}. |
I have to {do} on {day}. | I will {do} with my {rel} on {day}. | It took me {n} hours to {do} {when}. |
I've been to {country} {n} times. | I've just finished my exam. | I fell asleep on the sofa {when}. |
My {thing} broke down {when}. | Our {animal} had {n} babies {when}. | {name} gave me a {thing} {when}. |
{name} got married {when}. | The doctor told me {when} to rest. | It snowed in {city} when I was there. |
I was at the cinema with {name} {when}. | I was ill {when}. | I couldn't sleep {when}. |
I forgot my {thing} at {company}. | On {date} I ran a marathon. | In {year} I lived in {country} for a while.
""",
    "skill": """
To {task}, {trick}. | The trick to {task} is: {trick}. | When I have to {task}, I first {trick}. |
If you want to {task}, {trick}. | I found out how to {task}: {trick}. | My way to {task}: {trick}. |
Here is how we {task}: {trick}, then wait. | Whenever you {task}, remember to {trick}. |
The best way to {task} is to {trick}. | I learned that to {task} you have to {trick}. |
What works to {task}: {trick}. | Before you {task}, {trick}. | In order to {task} I always {trick}. |
Our recipe is to {trick} and then {task}. | You {task} like this: {trick}. | I managed to {task}, you just {trick}. |
The only way to {task} that worked was to {trick}. | Note on how to {task}: {trick}. |
Steps to {task}: 1. {trick} 2. wait 3. check. | We {task} by doing this: {trick}. |
For a good result when you {task}, {trick}. | First {trick}, that is how I {task}. |
I always {trick} before I {task}. | {trick} and it is easy to {task}. | My rule: {trick} whenever you {task}. |
One can {task} only if one remembers to {trick}.
""",
}
RETRIEVE = """
What is my name? | Where do I live? | How old am I? | What's my {rel}'s name? | Where do I work? |
When is my birthday? | What year was I born? | What is my {animal} called? | What colour is my {thing}? |
What am I allergic to? | When did I move to {city}? | Where does my {rel} work? | Who is {name}? |
When is {name}'s birthday? | How many cousins do I have? | What's my door code? | What do you know about me? |
What do you know about {name}? | Do you remember my name? | Do you remember where I live? |
Can you remind me of my phone number? | Tell me my {rel}'s name. | What is the password of my {thing}? |
What was my shoe size again? | Which car do I drive? | I forgot my door code, what was it? |
I can't remember where I put my {thing}. | What did I tell you about {name}? | What did I say about my {rel}? |
Have I told you where I work? | Did I mention {name}'s address? | Where did I grow up? | What's my favourite colour? |
Which food do I like best? | What do I like to drink? | Do I like {food}? | Does {name} like {drink}? |
What are my hobbies? | What does my {rel} prefer? | What did I have for lunch? | When did I last see {name}? |
Who did I meet {when}? | Where did I go {when}? | When did I lose my {thing}? | What did we watch {when}? |
Where is my {thing}? | When is my appointment with {name}? | What time is my flight? |
What time do I have to take my pills? | How did I {task} the last time? | How do we usually {task}? |
What was my trick to {task}? | Remind me how I {task}. | Name my {animal}. | My {rel}'s birthday is when? |
Is my {thing} {color} or {color}? | Am I married? | Do I have any pets? | How old is {name}? |
How old is our {animal}? | Which languages do I speak? | Where is {name} from? | What's {name}'s job? |
Who is my doctor? | Who was it that called me {when}? | Which city did I say I live in? |
You know my {rel}, what is her name? | Look up my address. | Do you still know what I do for a living? |
Could you tell me what my {thing} looks like? | When's our anniversary? | What have I told you so far about my work? |
In which drawer do I keep my {thing}? | With whom did I have dinner {when}? | my name? | {name}'s phone number? |
how did we {task} again? | When am I meeting {name}? | What is {mine}? | What was {mine} again? |
Do you remember {mine}? | Do you know {mine}? | Can you tell me {mine}? | Tell me what {mine} is. | I forgot {mine}. |
Remind me of {mine}. | What did I say {mine} was? | Have I told you {mine}? | I need {mine}. | Look up {mine}. |
{mine}? | Do you know what {mine} is? | Any idea what {mine} is? | What have you noted as {mine}? |
What's {mine}, do you recall? | Is {mine} {value}? | Please give me {mine}. | Could you check {mine} for me? |
Show me {mine}. | I don't remember {mine}. | Which one is {mine}? | Let me know {mine}. | When did I {do}? |
Did I {do}? | What did I do {when}? | With whom did I {do}? | Where did I {do}? | Do you remember when I {did}? |
How long ago did I {do}? | When was it that I {did}? | Have I told you that I {did}? | What happened {when}? |
Did {name} {do}? | When did {name} and I {do}? | When do I have to {do}? | What are my plans for {day}? |
What did {name} and I do {when}? | Who was with me when I {did}? | How long have I been a {job}? |
Where do I come from? | How many children do we have? | Why can't I eat {food}? | What time do I get up? |
When do I go to bed? | What do I do on {day}s? | Do I wear glasses? | How much do I weigh? | Where did I use to live? |
Where do my parents live? | Which school does my son go to? | Who works with me at {company}? |
Does {name} have any {animal}s? | What does {name} drive? | What food does {name} hate? |
In which country is our house? | What are our neighbours called? | How many people are in my family? |
Whom do I play music with? | Which university did I go to? | What am I saving money for? | What do I want to become? |
What do I like more, {drink} or {drink}? | How old is my mum? | Where's the spare key? |
How often have I been to {country}? | What happened to my {thing}? | What did {name} give me? |
What did the doctor tell me? | Was I ill {when}? | Who did I go to the cinema with? | Where did I leave my {thing}? |
What was I doing on {date}? | Tell me about my {rel}. | Tell me everything you know about {name}. |
What did we talk about {when}? | What's that thing I told you about my {rel}? | Have we met {name} before? |
Which of my friends likes {food}? | Was my {thing} {color}? | I wonder what {mine} was. | Help me remember {mine}. |
How many times did I {do}? | Why did I {do}?
"""
NEITHER = """
Write a poem about {topic}. | Write me a short story about {topic}. | Tell me a joke about {topic}. |
Compose a song about {topic}. | Invent a name for a shop that sells {food}. | Write a haiku on {topic}. |
Make up a fairy tale with a {animal} and a king. | Describe a sunset over {city}. |
Write an email to my boss asking for a day off. | Imagine that you are a {job} on the moon. |
Come up with five ideas for a party. | Give me a slogan for {company}. |
Continue this story: Once upon a time there was {topic}. | Write a dialogue between {famous} and a {animal}. |
Draw a cat with letters. | Hello! | Hi there, how are you? | Good morning! | How is it going? | Thanks a lot! |
Thank you, that was helpful. | Good night. | See you later. | What's up? | Ok. | That's great! | Haha, very funny. |
You are very smart. | Nice to meet you. | Are you a robot? | Who made you? | What can you do? | I see. |
Sounds good, go on. | Sorry, I don't understand. | No, that's wrong. | Yes please. | Let's talk about something else. |
What is the capital of {country}? | Who was {famous}? | How does {science} work? | When was {famous} born? |
What is the difference between {science} and {science}? | Why is the sky blue? | How many people live in {city}? |
Explain {science} to a child. | What does {science} mean? | How far is it from {city} to {city}? |
Which is the largest city of {country}? | What is {n} times {age}? | How do you say {food} in {lang}? |
Who wrote Hamlet? | What's the weather like in {city}? | Is {food} healthy? | What year did the war end? |
How tall is the Eiffel Tower? | Give me a recipe for {food}. | What's the best time to visit {country}? |
Tell me about the history of {city}. | Can {animal}s swim? | Define {science}. | Write a {code} function that {algo}. |
How do I sort a list in {code}? | Fix this code: for i in range({n}) print(i) |
What does this error mean: index out of range? | Explain this {code} snippet to me. |
Write a unit test for a function that {algo}. | Convert this {code} program to {code}. |
How do I install {code} on Linux? | What is a pointer in {code}? | def f(x): return x + {n} |
Write a regular expression for dates. | Make this {code} code faster. | Show me how to open a file in {code}. |
Translate this sentence to {lang}. | Translate "good morning" into {lang}. | Summarize the following text. |
Rewrite this paragraph in simpler words. | Correct the grammar of this sentence. | List three advantages of {hobby}. |
Give me {n} tips for {hobby}. | Compare {city} and {city}. | Make it shorter. | Try again, please. |
Say that in one sentence. | Count from 1 to {age}. | Convert {n} miles to kilometres. |
Sort these words: {food}, {drink}, {thing}. | Plan a weekend in {city}. | Suggest a good book about {science}. |
Pretend to be a pirate. | Answer with yes or no only. | Solve {n}x + {age} = {year}. | Water boils at 100 degrees. |
{city} is a beautiful city. | The earth goes around the sun. | {famous} died a long time ago. |
{science} is an important subject. | The {animal} is a mammal. | He opened the door and walked into the dark room. |
Once upon a time there was an old king who had a {animal}. | It is raining. | What do you think about {science}? |
Do you like {food}? | What's your name? | Where do you live? | How old are you? | What is your favourite colour? |
Can you help me? | Could you write a letter for me? | I want you to write a poem about {topic}. |
I need a {code} script that {algo}. | I'd like to know how {science} works. | I wonder why {animal}s sleep so much. |
I have a question. | I don't know. | I think that's right. | I agree with you. | What is {yours}? |
Do you have a {noun}? | Is {yours} {value}? | What does the word {noun} mean? | Write a poem about {my}. |
Help me choose a new {noun}. | Why do people have a {noun}? | Suggest ideas for a {noun}. |
Write a {code} class with a field for the {noun}. | How do I store a {noun} in {code}? | How can people {do}? |
How does one {do}? | Write a story in which someone {did}. | What should I wear to {do}? |
Give me advice on how to {do}. | Have you ever {did}? | Why do people {do}? | Is it hard to {do}? |
Did {famous} {do}? | {famous} {did} in {year}. | In the story a {job} {did}. |
Tell me a story about a {job} who {did}. | Hello, how is your day? | Good afternoon! | Bye! | Good evening to you. |
Welcome back. | How have you been? | Cool. | Awesome, thank you. | Great job! | Okay, thanks. | Never mind. |
No problem. | No thanks. | Yes. | No. | Right. | Hmm, interesting. | Really? | Wow, that's amazing. | I'm bored. |
Lol. | That's not what I meant. | You're welcome. | Have a nice day! | Let's start. | Please continue. | Stop. |
Wait a moment. | Are you there? | What do you mean? | Can you repeat that? | Why? | Tell me something interesting. |
Let's play a game. | Ask me a question. | Act as a {job}. | Give me a synonym for {science}. | Use simpler words. |
Turn this into a table. | Paraphrase the last sentence. | Shorten this text to {n} words. |
Read this article and tell me the main points. | Check this for spelling mistakes. |
What happens if you mix {drink} and {drink}? | Which country is bigger, {country} or {country}? |
How long does it take to fly from {city} to {city}? | How much does a {thing} cost? | Where is {city}? |
Who discovered {science}? | Who is the president of {country}? | When was {city} founded? |
How many legs does a spider have? | What is the meaning of life? | Is {science} dangerous? | What do {animal}s eat? |
How is {food} made? | What causes {science}? | {order} {work}. | {order} {work} about {subject}. |
Please {order} {work} for me. | Can you {order} {work}? | Could you {order} {work} about {subject}, please? |
I want you to {order} {work}. | I'd like you to {order} {work} about {subject}. | Now {order} {work} in {n} lines. |
{order} {subject} in one paragraph. | First {order} {work}, then {order} {work}. | Your task is to {order} {work}. |
Would you {order} {work} in {lang}? | Let's {order} {work} together. | Don't {order} {work}, {order} {work} instead. |
We need {work} about {subject}. | What is {subject}? | What are {subject} good for? | How did {subject} begin? |
When did {subject} appear? | Who invented {subject}? | Why are {subject} important? | Why is {subject} so popular? |
How many kinds of {subject} are there? | Where can one find {subject}? | Are {subject} expensive? |
Do {subject} really exist? | Does {subject} matter? | Is it true that {subject} cannot be changed? |
What can we learn from {subject}? | Which books about {subject} are good? | What are the pros and cons of {subject}? |
Tell me about {subject}. | Tell me a fact about {subject}. | I am interested in how {subject} works. |
Teach me about {subject}. | Give an example of {subject}. | {subject} changed the world in the {n}th century. |
{subject} is one of the most interesting things there is. | People have studied {subject} for a long time. |
Many books were written about {subject}. | She looked at the {thing} and said nothing. |
They walked through {city} until the evening. | The old {job} smiled and closed the door. |
How would you describe yourself? | Do you have feelings? | Are you able to {order} {work}? |
Do you remember anything from your training? | Did you sleep well? | Who are you? | Where are you from? |
What do you like to eat? | I'm glad that you are here. | I'm fine, thanks, and you? | You did that well. |
You are wrong. | You're funny. | I love it! | I hate this. | I like your answer. | My goodness! | I can't believe it. |
I mean the other one. | I don't get it. | Perfect, that's what I wanted. | More details please. | And then? |
Anything else? | Same here. | Not bad. | One more.
"""
# What makes a statement uncertain.
HEDGES = (
    "I think {}|maybe {}|if I'm not mistaken, {}|I'm not sure, but {}|I think that {}|{}, I guess|perhaps {}|"
    "probably {}|I believe {}|{}, I'm not sure though|as far as I remember, {}|{}, but don't quote me on that|"
    "it might be that {}|{} or something like that|I guess {}|I'm not certain but {}|{}, I think|{}, probably|"
    "I suppose {}|{} maybe"
)
OPENINGS = "Hey, |Hi! |By the way, |btw |So, |Well, |Just so you know, |Listen, |Okay, |One more thing: "
CLOSINGS = " thanks| :)| please| lol| thank you!| 😀"
# Facts whose questions use other words or forms: of the speaker and of another, each a statement, one that is held
# out, and questions, of which the last is held out.
REWORDED = """
I live in {city}.| The city I live in is {city}.| Where do I live?| What city am I living in?|
  Where is it that I live?
{who} lives in {city}.| The city {who} lives in is {city}.| Where does {who} live?| What city is {who} living in?|
  Where is it that {who} lives?
I work as a {job}.| I have been working as a {job} for years.| What do I work as?| What do I do for work?|
  What kind of work do I do?
{who} works as a {job}.| {who} has been working as a {job} for years.| What does {who} work as?|
  What does {who} do for work?| What kind of work does {who} do?
I drive a {color} car.| The car that I drive is {color}.| What colour is the car I drive?| Which car do I drive?|
  What kind of car am I driving?
{who} drives a {color} car.| The car that {who} drives is {color}.| What colour is the car {who} drives?|
  Which car does {who} drive?| What kind of car is {who} driving?
I was born in {year}.| {year} is the year in which I was born.| When was I born?| What year was I born?|
  In which year was it that I was born?
{who} was born in {year}.| {year} is the year in which {who} was born.| When was {who} born?|
  What year was {who} born?| In which year was it that {who} was born?
I'm allergic to {food}.| I have an allergy to {food}.| What am I allergic to?| Which allergies do I have?|
  What must I not eat because of an allergy?
{who} is allergic to {food}.| {who} has an allergy to {food}.| What is {who} allergic to?|
  Which allergies does {who} have?| What must {who} not eat because of an allergy?
I love {hobby}.| {hobby} is what I love to do.| What do I love?| What do I love doing?|
  Which pastime is it that I love?
{who} loves {hobby}.| {hobby} is what {who} loves to do.| What does {who} love?| What does {who} love doing?|
  Which pastime is it that {who} loves?
I'm married to {name}.| {name} is the one I married.| Who am I married to?| To whom am I married?|
  Who is it that I married?
{who} is married to {name}.| {name} is the one {who} married.| Who is {who} married to?| To whom is {who} married?|
  Who is it that {who} married?
I speak {lang} at home.| {lang} is the language that I speak at home.| What do I speak at home?|
  Which language do I speak at home?| What language is spoken in my home?
{who} speaks {lang} at home.| {lang} is the language that {who} speaks at home.| What does {who} speak at home?|
  Which language does {who} speak at home?| What language is spoken in {who}'s home?
I can't stand {food}.| {food} is something I can't stand.| What can't I stand?| Which food can't I stand?|
  What is it that I cannot stand?
{who} can't stand {food}.| {food} is something {who} can't stand.| What can't {who} stand?|
  Which food can't {who} stand?| What is it that {who} cannot stand?
I have a parrot called {pet}.| The name of my parrot is {pet}.| What is my parrot called?|
  What's the name of my parrot?| How do I call my parrot?
{who} has a parrot called {pet}.| The name of {who}'s parrot is {pet}.| What is {who}'s parrot called?|
  What's the name of {who}'s parrot?| How does {who} call the parrot?
I grew up in {country}.| {country} is where I grew up.| Where did I grow up?| Which country did I grow up in?|
  Where was I growing up?
{who} grew up in {country}.| {country} is where {who} grew up.| Where did {who} grow up?|
  Which country did {who} grow up in?| Where was {who} growing up?
I studied {science} at university.| {science} is what I studied at the university.| What did I study?|
  Which subject did I study?| What was I studying at the university?
{who} studied {science} at university.| {science} is what {who} studied at the university.| What did {who} study?|
  Which subject did {who} study?| What was {who} studying at the university?
I take my medicine at {time}.| My medicine has to be taken at {time}.| When do I take my medicine?|
  What time should I take my medicine?| At what hour am I taking medicine?
{who} takes medicine at {time}.| {who}'s medicine has to be taken at {time}.| When does {who} take medicine?|
  What time should {who} take medicine?| At what hour is {who} taking medicine?
I keep the spare key under the {thing}.| The spare key that I keep is under the {thing}.|
  Where do I keep the spare key?| Where is my spare key?| Where am I keeping the key?
{who} keeps the spare key under the {thing}.| The spare key that {who} keeps is under the {thing}.|
  Where does {who} keep the spare key?| Where is {who}'s spare key?| Where is {who} keeping the key?
"""
